"""Faults of formulas, tables, files larger than memory, reports and the program."""

from tests.faults.fault import Fault

FORMULA = "openreml_nn/table/formula.py"
ENCODER = "openreml_nn/table/encoder.py"
GROUPS = "openreml_nn/table/groups.py"
LAGS = "openreml_nn/table/lags.py"
LEVELS = "openreml_nn/table/levels.py"
MATRIX = "openreml_nn/table/matrix.py"
RESIDUAL = "openreml_nn/table/residual.py"
ROWS = "openreml_nn/table/rows.py"
TEXT = "openreml_nn/table/text.py"
STREAM = "openreml_nn/model/stream.py"
APP = "openreml_nn/program/main.py"

FAULTS = [
    Fault(
        "a/b is a and b",
        FORMULA,
        "Grouping((*outer[-1].columns, *of.columns))",
        "of",
        "tests/table/test_formula.py",
    ),
    Fault(
        "independent slopes keep their intercept",
        FORMULA,
        'Operation("+", (Number(0.0), product))',
        "product",
        "tests/table/test_formula.py",
    ),
    Fault(
        "a bar between independent effects is one of correlated ones",
        FORMULA,
        'if structure is None and bar.node.operator == "||":',
        'if structure is None and bar.node.operator == "":',
        "tests/table/test_formula.py",
    ),
    Fault(
        "a missing value in any column drops a row",
        ENCODER,
        "present = table[list(columns)].notna()",
        "present = table.notna()",
        "tests/table/test_encoder.py -k missing",
    ),
    Fault(
        "levels are in the order of their appearance",
        LEVELS,
        "order = np.argsort(np.asarray(uniques))",
        "order = np.arange(len(uniques))",
        "tests/table/test_encoder.py",
    ),
    Fault(
        "a categorical's levels are sorted by spelling",
        LEVELS,
        "own.sort(key=rank.__getitem__)",
        "own.sort()",
        "tests/table/test_encoder.py",
    ),
    Fault(
        "positions of residuals are in the order of their appearance",
        LAGS,
        "return (whole - first) // unit",
        "return np.unique(times, return_inverse=True)[1]",
        "tests/table/test_encoder.py -k ar1",
    ),
    Fault(
        "an unknown combination is a level",
        GROUPS,
        "np.where(seen & (cells[at] == cell), at, -1)",
        "np.where(seen, at, -1)",
        "tests/test_linear.py",
    ),
    Fault(
        "a new table's transforms are learned anew",
        ROWS,
        "return self._learned.transforms.setdefault(call, {})",
        "return {}",
        "tests/table/test_encoder.py -k another_table",
    ),
    Fault(
        "the groups of residuals are the strata of all",
        RESIDUAL,
        "np.arange(n) * len(labels) + codes",
        "codes",
        "tests/table/test_encoder.py -k residual",
    ),
    Fault(
        "weights are taken by their rank among the rows",
        ENCODER,
        "return torch.from_numpy(found)",
        "return torch.from_numpy(found[::-1].copy())",
        "tests/table/test_encoder.py -k weight",
    ),
    Fault(
        "names of levels stand in brackets",
        MATRIX,
        "[name + suffix for suffix in suffixes]",
        '[f"{name}[{suffix}]" for suffix in suffixes]',
        "tests/table/test_encoder.py -k names",
    ),
    Fault(
        "numbers that name levels are sorted by spelling when streamed",
        ENCODER,
        'return number_key if order == "number" else str',
        "return str",
        "tests/table/test_stream.py -k chunks_give",
    ),
    Fault(
        "streamed rows that miss a value are not counted",
        STREAM,
        "self.dropped += encoded.dropped_rows if own else 0",
        "self.dropped += 0",
        "tests/table/test_stream.py -k miss",
    ),
    Fault(
        "the streamed response is not taken off its fit",
        STREAM,
        "M[kept, :-1], M[kept, -1], M[-1, -1] = inner, -b, 1.0",
        "M[kept, :-1], M[kept, -1], M[-1, -1] = inner, b, 1.0",
        "tests/table/test_stream.py -k chunks_give",
    ),
    Fault(
        "every process reads every chunk",
        STREAM,
        "parts.add(encoder, chunk, i % size == rank)",
        "parts.add(encoder, chunk, True)",
        "tests/table/test_stream.py -k processes",
    ),
    Fault(
        "the best run is the worst",
        "openreml_nn/report/sweep.py",
        "table[by].idxmin()",
        "table[by].idxmax()",
        "tests/test_report.py -k best",
    ),
    Fault(
        "a caterpillar's intervals are of one standard error",
        "openreml_nn/report/plots.py",
        "middle, half = blup[order], 1.96 * error[order]",
        "middle, half = blup[order], error[order]",
        "tests/test_report.py -k plots",
    ),
    Fault(
        "a semivariogram lacks its half",
        "openreml_nn/report/plots.py",
        "numpy(force=True) ** 2 / 2",
        "numpy(force=True) ** 2",
        "tests/test_report.py -k semivariogram",
    ),
    Fault(
        "a table of BLUPs has variances for standard errors",
        "openreml_nn/result/tables.py",
        "spread = variances.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()",
        "spread = variances.diagonal(dim1=1, dim2=2).clamp(min=0)",
        "tests/test_report.py -k 'tables'",
    ),
    Fault(
        "the result comes before the files that it vouches for",
        "openreml_nn/report/run.py",
        'write_text(folder / "summary.txt", run.summary())',
        'write_text(folder / "result.json", "{}")\n'
        '    write_text(folder / "summary.txt", run.summary())',
        "tests/test_report.py -k fails",
    ),
    Fault(
        "a file that fails is left half written",
        "openreml_nn/support/files.py",
        "temporary.unlink(missing_ok=True)",
        "pass",
        "tests/test_files.py",
    ),
    Fault(
        "a fault of the input ends with status 1",
        APP,
        'print(f"error: {message}", file=sys.stderr)\n    sys.exit(2)',
        'print(f"error: {message}", file=sys.stderr)\n    sys.exit(1)',
        "tests/test_app.py -k one_line",
    ),
    Fault(
        "a sweep minimises the log-likelihood",
        APP,
        'validation.get("val_negative_log_density", model.result.deviance)',
        'validation.get("val_negative_log_density", -model.result.deviance)',
        "tests/test_app.py -k minimises",
    ),
    Fault(
        "rows that are held out do not depend on the seed",
        APP,
        "split_by=None if config.data.split_by is None else str(config.data.split_by),\n"
        "            seed=config.seed,",
        "split_by=None if config.data.split_by is None else str(config.data.split_by),",
        "tests/test_app.py -k the_seed_chooses",
    ),
    Fault(
        "a config may name any function",
        "openreml_nn/support/instantiate.py",
        "if not isinstance(found, type) or",
        "if",
        "tests/test_instantiate.py",
    ),
    Fault(
        "a formula may call any function",
        FORMULA,
        "node.function not in FUNCTIONS",
        "not node.function",
        "tests/table/test_formula.py",
    ),
    Fault(
        "levels that a formula makes are forgotten",
        ROWS,
        "levels = self._learned.factors.get(key)",
        "levels = None",
        "tests/table/test_levels.py -k subset",
    ),
    Fault(
        "a factor has contrasts though its margin is missing",
        MATRIX,
        "if first or (rest and rest not in known):",
        "if first:",
        "tests/table/test_values.py -k columns_are",
    ),
    Fault(
        "digits with a leading zero are a number",
        TEXT,
        'return "text" if _has_leading_zero(values) else "int"',
        'return "int"',
        "tests/table/test_reading.py -k kinds",
    ),
    Fault(
        "an offset is left in the response",
        "openreml_nn/table/encoded.py",
        "return self.y if self.offset is None else self.y - self.offset",
        "return self.y",
        "tests/table/test_values.py -k offset",
    ),
    Fault(
        "a spreadsheet runs what a table holds",
        "openreml_nn/table/writing.py",
        'return "\'" + value',
        "return value",
        "tests/table/test_reading.py -k spreadsheet",
    ),
    Fault(
        "an id is found by its rounded value",
        LEVELS,
        "loose[key] = -1 if key in loose else i",
        "loose[key] = i",
        "tests/table/test_levels.py -k two_levels",
    ),
    Fault(
        "lags of ar1 are counted in units of one",
        LAGS,
        "initial=0)) or 1",
        "initial=0)) * 0 or 1",
        "tests/table/test_encoder.py -k lags",
    ),
    Fault(
        "a group may have a position twice",
        RESIDUAL,
        "if twice.any() and not part.nugget:",
        "if twice.all() and not part.nugget:",
        "tests/table/test_encoder.py -k errors_of_residuals",
    ),
    Fault(
        "Helmert contrasts compare with one level",
        "openreml_nn/table/bases.py",
        "np.where(i == j + 1, j + 1.0, 0.0)",
        "np.where(i == j + 1, 1.0, 0.0)",
        "tests/table/test_values.py -k contrasts",
    ),
    Fault(
        "a natural spline is constant below its range",
        "openreml_nn/table/bases.py",
        "np.outer(np.minimum(x - low, 0), slope[0])",
        "np.outer(0 * x, slope[0])",
        "tests/table/test_values.py -k 'splines or bases'",
    ),
    Fault(
        "orthogonal polynomials are centred at the mean only",
        "openreml_nn/table/bases.py",
        '(x - state["alpha"][k]) * present',
        '(x - state["alpha"][0]) * present',
        "tests/table/test_values.py",
    ),
]
