"""Faults of formulas, tables, files larger than memory, reports and the program."""

from tests.faults.fault import Fault

FORMULA = "openreml_nn/formula.py"
DATA = "openreml_nn/data.py"
STREAM = "openreml_nn/stream.py"
APP = "openreml_nn/app.py"

FAULTS = [
    Fault(
        "a/b is a and b",
        FORMULA,
        "(*(found[-1] if found else ()), *(name",
        "(*(found[-1] if not found else ()), *(name",
        "tests/test_formula.py",
    ),
    Fault(
        "independent slopes keep their intercept",
        FORMULA,
        'else f"0 + {term}" for term in terms',
        "else str(term) for term in terms",
        "tests/test_formula.py",
    ),
    Fault(
        "a bar between independent effects is one of correlated ones",
        FORMULA,
        "independent = len(sides) == 3 and not sides[1]\n    if independent:",
        "independent = False\n    if len(sides) == 3:",
        "tests/test_formula.py",
    ),
    Fault(
        "a missing value in any column drops a row",
        DATA,
        "present = table.notna()[list(columns)].all(axis=1).to_numpy()",
        "present = table.notna().all(axis=1).to_numpy()",
        "tests/test_data.py -k missing",
    ),
    Fault(
        "levels are in the order of their appearance",
        DATA,
        "order = np.argsort(np.asarray(uniques))",
        "order = np.arange(len(uniques))",
        "tests/test_data.py",
    ),
    Fault(
        "a categorical's levels are sorted by spelling",
        DATA,
        "order = np.argsort(column.cat.categories.get_indexer(uniques))",
        "order = np.argsort(np.asarray(labels, dtype=str))",
        "tests/test_data.py",
    ),
    Fault(
        "positions of residuals are in the order of their appearance",
        DATA,
        "position, positions = _coded(table[part.position])",
        "position, positions = _coded(\n"
        "                    table[part.position], [str(v) for v in table[part.position].unique()]\n"
        "                )",
        "tests/test_data.py -k residual",
    ),
    Fault(
        "an unknown combination is a level",
        DATA,
        "np.where(seen & (cells[at] == cell), at, -1)",
        "np.where(seen, at, -1)",
        "tests/test_data.py -k 'another_table or combination'",
    ),
    Fault(
        "a new table's transforms are learned anew",
        DATA,
        'transform_state=self.state["transforms"].get(key, {})',
        "transform_state={}",
        "tests/test_data.py -k another_table",
    ),
    Fault(
        "the groups of residuals are the strata of all",
        DATA,
        "group, position = np.arange(len(table)), stratum",
        "group, position = stratum * 0, stratum",
        "tests/test_data.py -k residual",
    ),
    Fault(
        "weights are taken by their rank among the rows",
        DATA,
        "return torch.from_numpy(numbers)",
        "return torch.from_numpy(numbers[::-1].copy())",
        "tests/test_data.py -k weight",
    ),
    Fault(
        "rows of R's names keep formulaic's brackets",
        DATA,
        r"""re.sub(r"\[(?:T\.)?([^\]]*)\]", r"\1", column)""",
        "column",
        "tests/test_data.py -k names",
    ),
    Fault(
        "numbers that name levels are sorted by spelling when streamed",
        STREAM,
        "tuple(float(x) if n else x for x, n in zip(label, numeric, strict=True))",
        "label",
        "tests/test_stream.py -k chunks_give",
    ),
    Fault(
        "streamed rows that miss a value are not counted",
        STREAM,
        "self.dropped += len(chunk) - int(complete)",
        "self.dropped += 0",
        "tests/test_stream.py -k miss",
    ),
    Fault(
        "the streamed response is not taken off its fit",
        STREAM,
        "M[kept, :-1], M[kept, -1], M[-1, -1] = inner, -b, 1.0",
        "M[kept, :-1], M[kept, -1], M[-1, -1] = inner, b, 1.0",
        "tests/test_stream.py -k chunks_give",
    ),
    Fault(
        "every process reads every chunk",
        STREAM,
        "if i % size == rank:",
        "if True:",
        "tests/test_stream.py -k processes",
    ),
    Fault(
        "the best run is the worst",
        "openreml_nn/sweep.py",
        "table[by].idxmin()",
        "table[by].idxmax()",
        "tests/test_report.py -k best",
    ),
    Fault(
        "a caterpillar's intervals are of one standard error",
        "openreml_nn/report/plots.py",
        'half = 1.96 * part["std_error"]',
        'half = part["std_error"]',
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
        "openreml_nn/estimation/tables.py",
        '"std_error": variance.sqrt().flatten()',
        '"std_error": variance.flatten()',
        "tests/test_report.py -k 'tables'",
    ),
    Fault(
        "the result comes before the files that it vouches for",
        "openreml_nn/report/run.py",
        'write_text(folder / "summary.txt", run.summary())',
        'write_text(folder / "result.json", "{}")\n'
        '    write_text(folder / "summary.txt", run.summary())',
        "tests/test_report.py -k run_directory",
    ),
    Fault(
        "a file that fails is left half written",
        "openreml_nn/files.py",
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
        "tests/test_app.py -k 'without_arguments or minimises'",
    ),
    Fault(
        "rows that are held out do not depend on the seed",
        APP,
        "split_by=None if config.data.split_by is None else str(config.data.split_by),\n"
        "            seed=config.seed,",
        "split_by=None if config.data.split_by is None else str(config.data.split_by),",
        "tests/test_app.py -k 'sweep or seed'",
    ),
    Fault(
        "a config may name any function",
        "openreml_nn/instantiate.py",
        "if not isinstance(found, type) or",
        "if",
        "tests/test_instantiate.py",
    ),
    Fault(
        "a formula may call any function",
        FORMULA,
        "direct = isinstance(node.func, ast.Name) and node.func.id in FUNCTIONS",
        "direct = isinstance(node.func, ast.Name)",
        "tests/test_formula.py",
    ),
]
