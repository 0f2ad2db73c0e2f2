"""Worked examples of a textbook, at its variances: fixed effects, BLUPs and their errors.

Mrode and Pocrnic, Linear Models for the Prediction of Animal Breeding Values, 4th edition (2023);
numbers of the 3rd edition (Mrode 2014) in brackets. Solutions of eight digits are those that
BLUPF90 prints in Masuda, Introduction to BLUPF90 suite programs (2019), chapter "Numerical
examples from Mrode (2014)", of which seven agree with exact arithmetic; of three or four digits,
the book's.
"""

import numpy as np
import pandas as pd
import pytest

from openreml_nn import lmm
from openreml_nn.covariance import (
    Pedigree,
    epistatic_relationship,
    genomic_relationship,
    marker_codes,
    marker_effects,
    single_step_relationship,
)
from openreml_nn.report import blup_table

CALVES = pd.DataFrame(
    {
        "animal": range(4, 10),
        "sire": [1, 3, 1, 4, 3, 7],
        "dam": [0, 2, 2, 5, 6, 0],
        "sex": list("MFFMMF"),
        "wwg": [4.5, 2.9, 3.9, 3.5, 5.0, 4.0],
        "pwg": [6.8, 5.0, 6.8, 6.0, 7.5, np.nan],
    }
)
FIVE = CALVES.iloc[:5]
CALF_PEDIGREE = pd.DataFrame(
    {"animal": range(1, 9), "sire": [0, 0, 0, 1, 3, 1, 4, 3], "dam": [0, 0, 0, 0, 2, 2, 5, 6]}
)
COW_PEDIGREE = pd.DataFrame(
    {"animal": range(1, 9), "sire": [0, 0, 0, 1, 3, 1, 3, 1], "dam": [0, 0, 0, 2, 2, 5, 4, 7]}
)
THREE, EIGHT = {"atol": 6e-4, "rtol": 0}, {"atol": 2e-7, "rtol": 0}


def blups(result, group, column="blup"):
    """A row for each level, in the order of numbers, and a column for each effect."""
    table = blup_table(result).query("group == @group")
    wide = table.pivot(index="level", columns="effect", values=column)
    return wide.loc[sorted(wide.index, key=int), list(dict.fromkeys(table["effect"]))].to_numpy()


def fixed(result):
    return dict(zip(result.fixed.names, result.fixed.estimate.tolist(), strict=True))


def cholesky(group, matrix):
    """Constraints that hold an unstructured covariance."""
    L = np.linalg.cholesky(matrix)
    return {f"{group}/L_{i}_{j}": L[i, j] for i in range(len(L)) for j in range(i + 1)}


@pytest.mark.parametrize("solver", ["dense", "sparse"])
def test_animal_model(solver):
    """Example 4.1 (3.1): gain of five calves, variances 20 and 40."""
    found = lmm(
        "wwg ~ 0 + sex + (1 | ped(animal))", FIVE, pedigree=CALF_PEDIGREE, solver=solver,
        constraints={"animal/sigma^2": 20.0}, residual_variance=40.0,
    )  # fmt: skip
    np.testing.assert_allclose(
        [fixed(found)["sexM"], fixed(found)["sexF"]], [4.35850233, 3.40443010], **EIGHT
    )
    np.testing.assert_allclose(
        blups(found, "animal")[:, 0],
        [0.09844458, -0.01877010, -0.04108420, -0.00866312,
         -0.18573210, 0.17687209, -0.24945855, 0.18261469],
        **EIGHT,
    )  # fmt: skip
    np.testing.assert_allclose(
        blups(found, "animal", "std_error")[:, 0],
        [4.34094096, 4.43664612, 4.27297922, 4.13608581,
         4.13814812, 4.20610397, 4.20407502, 4.11029997],
        **EIGHT,
    )  # fmt: skip


def test_sire_model():
    """Example 4.2 (3.2): the same calves by their sires, variances 5 and 55; sire 4 is a son of 1."""
    sires = pd.DataFrame({"animal": [1, 3, 4], "sire": [0, 0, 1], "dam": [0, 0, 0]})
    found = lmm(
        "wwg ~ 0 + sex + (1 | ped(sire))", FIVE, pedigree=sires,
        constraints={"sire/sigma^2": 5.0}, residual_variance=55.0,
    )  # fmt: skip
    np.testing.assert_allclose(
        [fixed(found)["sexM"], fixed(found)["sexF"]], [4.33567107, 3.38198579], **EIGHT
    )
    np.testing.assert_allclose(
        blups(found, "sire")[:, 0], [0.02200220, 0.01402640, -0.04304180], **EIGHT
    )


def grouped_pedigree():
    return Pedigree.of(
        range(1, 9), ["G1", "G1", "G1", 1, 3, 1, 4, 3], ["G2", "G2", "G2", "G2", 2, 2, 5, 6],
        groups=["G1", "G2"],
    )  # fmt: skip


#: Animals, and then groups, of which the first is held at zero.
WITH_GROUPS = [
    -0.76706148, -0.92310585, -0.96296296, -1.26790750,
    -1.09907877, -0.72776838, -1.33840948, -0.76790750, 0.0, -1.76875353,
]  # fmt: skip


def test_groups_of_unknown_parents_as_fixed_effects():
    """Example 4.4 (3.4): unknown sires and dams have means of their own."""
    pedigree = grouped_pedigree()
    Q = pedigree.contributions
    np.testing.assert_allclose(Q["G1"], [0.5, 0.5, 0.5, 0.25, 0.5, 0.5, 0.375, 0.5], atol=1e-15)
    np.testing.assert_allclose(Q.sum(axis=1), 1.0, atol=1e-15)
    table = FIVE.join(Q, on=FIVE["animal"].astype(str)).drop(columns="key_0", errors="ignore")
    found = lmm(
        "wwg ~ 0 + sex + G2 + (1 | ped(animal))", table, pedigree=pedigree,
        constraints={"animal/sigma^2": 20.0}, residual_variance=40.0,
    )  # fmt: skip
    g = fixed(found)["G2"]
    np.testing.assert_allclose(
        [fixed(found)["sexM"], fixed(found)["sexF"], g],
        [5.45807483, 4.31342367, WITH_GROUPS[9]], **EIGHT,
    )  # fmt: skip
    np.testing.assert_allclose(blups(found, "animal")[:, 0] + g * Q["G2"], WITH_GROUPS[:8], **EIGHT)


def test_groups_of_unknown_parents_as_random_effects_go_to_the_fixed_ones():
    """Example 4.4 (3.4) by the equations of Quaas: differences are estimable."""
    found = lmm(
        "wwg ~ 0 + sex + (1 | vm(animal, K))", FIVE, solver="dense",
        kernels={"K": grouped_pedigree().grouped(1e8)},
        constraints={"animal/sigma^2": 20.0}, residual_variance=40.0,
    )  # fmt: skip
    table = blup_table(found).set_index("level")["blup"]
    value = table.loc[[*map(str, range(1, 9)), "G1", "G2"]].to_numpy()
    np.testing.assert_allclose(value - value[8], WITH_GROUPS, atol=1e-6)


def test_permanent_environment():
    """Example 5.1 (4.1): fat yield of two lactations, variances 20, 12 and 28."""
    cows = pd.DataFrame(
        {
            "cow": np.repeat(range(4, 9), 2),
            "parity": list("12") * 5,
            "hys": list("1314231324"),
            "fat": [201.0, 280, 150, 200, 160, 190, 180, 250, 285, 300],
        }
    )
    with pytest.warns(
        RuntimeWarning, match="dropped hys4"
    ):  # seasons 1, 2 and 3, 4 are of a parity
        found = lmm(
            "fat ~ 0 + parity + hys + (1 | ped(cow)) + (1 | cow)", cows, pedigree=COW_PEDIGREE,
            constraints={"cow/sigma^2": 20.0, "cow_1/sigma^2": 12.0}, residual_variance=28.0,
        )  # fmt: skip
    genetic, permanent = (effects.values[:, 0] for effects in found.random)
    assert blup_table(found)["level"].tolist() == list("1234567845678")
    np.testing.assert_allclose(
        genetic, [10.148, -3.084, -7.063, 13.581, -18.207, -18.387, 9.328, 24.194], **THREE
    )
    np.testing.assert_allclose(permanent, [8.417, -7.146, -17.229, -1.390, 17.347], **THREE)


def test_random_regression():
    """Example 10.2 (9.2): fat of test days by Legendre polynomials of degree 2."""
    yields = {
        4: [17.0, 18.6, 24.0, 20.0, 20.0, 15.6, 16.0, 13.0, 8.2, 8.0],
        5: [23.0, 21.0, 18.0, 17.0, 16.2, 14.0, 14.2, 13.4, 11.8, 11.4],
        6: [10.4, 12.3, 13.2, 11.6, 8.4],
        7: [22.8, 22.4, 21.4, 18.8, 18.3, 16.2, 15.0],
        8: [22.2, 20.0, 21.0, 23.0, 16.8, 11.0, 13.0, 17.0, 13.0, 12.6],
    }
    first = {4: 1, 5: 1, 6: 6, 7: 4, 8: 1}
    records = pd.DataFrame(
        [
            {"cow": cow, "day": 4 + 34 * j, "date": f"d{first[cow] + j:02d}", "fat": value}
            for cow, row in yields.items()
            for j, value in enumerate(row)
        ]
    )
    G = [[3.297, 0.594, -1.381], [0.594, 0.921, -0.289], [-1.381, -0.289, 1.005]]
    P = [[6.872, -0.254, -1.101], [-0.254, 3.171, 0.167], [-1.101, 0.167, 2.457]]
    curve = "0 + legendre(day, 2, intercept = TRUE)"
    found = lmm(
        f"fat ~ 1 + date + legendre(day, 4) + us({curve} | ped(cow)) + us({curve} | cow)", records,
        pedigree=COW_PEDIGREE, constraints=cholesky("cow", G) | cholesky("cow_1", P),
        residual_variance=3.710,
    )  # fmt: skip
    at = fixed(found)
    dates = np.array([0.0, *(at[f"dated{i:02d}"] for i in range(2, 11))])
    printed = [10.0862, 7.5908, 8.5601, 8.2430, 6.3161, 3.0101, 3.1085, 3.1718, 0.5044, 0]
    np.testing.assert_allclose(dates - dates[-1], printed, atol=3e-4)
    np.testing.assert_allclose(
        [at[f"legendre(day, 4){k}"] for k in range(1, 5)], [-0.6253, -0.1346, 0.3479, -0.4218],
        atol=2e-4,
    )  # fmt: skip
    np.testing.assert_allclose(
        found.random[0].values,
        [[-0.0583, 0.0552, -0.0442], [-0.0728, -0.0305, -0.0244], [0.1311, -0.0247, 0.0686],
         [0.3445, 0.0063, -0.3164], [-0.4537, -0.0520, 0.2798], [-0.5485, 0.0730, 0.1946],
         [0.8518, -0.0095, -0.3131], [0.2209, 0.0127, -0.0174]],
        atol=1e-4,
    )  # fmt: skip
    np.testing.assert_allclose(
        found.random[1].values,
        [[-0.6487, -0.3601, -1.4718], [-0.7761, 0.1370, 0.9688], [-1.9927, 0.9851, -0.0693],
         [3.5188, -1.0510, -0.4048], [-0.1013, 0.2889, 0.9771]],
        atol=1e-4,
    )  # fmt: skip


def two_traits(table, pedigree):
    return lmm(
        "cbind(wwg, pwg) ~ 0 + trait:sex + us(trait | ped(animal))", table, pedigree=pedigree,
        constraints=cholesky("animal", [[20.0, 18], [18, 40]])
        | cholesky("residual", [[40.0, 11], [11, 30]]),
    )  # fmt: skip


def test_two_traits():
    """Example 6.1 (5.1): gain before and after weaning."""
    found = two_traits(FIVE, CALF_PEDIGREE)
    np.testing.assert_allclose(sorted(fixed(found).values()), [3.397, 4.361, 5.880, 6.800], **THREE)
    np.testing.assert_allclose(
        blups(found, "animal"),
        [[0.151, 0.280], [-0.015, -0.008], [-0.078, -0.170], [-0.010, -0.013],
         [-0.270, -0.478], [0.276, 0.517], [-0.316, -0.479], [0.244, 0.392]],
        **THREE,
    )  # fmt: skip
    np.testing.assert_allclose(
        blups(found, "animal", "std_error")[0], [4.313320612, 5.991809902], rtol=1e-9
    )


def test_two_traits_of_which_one_is_missing_in_rows():
    """Example 6.2 (5.2): animals 4 and 9 have the first trait only."""
    table = CALVES.assign(pwg=CALVES["pwg"].where(CALVES["animal"] != 4))
    pedigree = pd.concat(
        [CALF_PEDIGREE, pd.DataFrame({"animal": [9], "sire": [7], "dam": [0]})], ignore_index=True
    )
    found = two_traits(table, pedigree)
    np.testing.assert_allclose(sorted(fixed(found).values()), [3.657, 4.367, 6.007, 6.834], **THREE)
    np.testing.assert_allclose(
        blups(found, "animal"),
        [[0.130, 0.266], [-0.084, -0.075], [-0.098, -0.194], [0.007, 0.016], [-0.343, -0.555],
         [0.192, 0.440], [-0.308, -0.483], [0.201, 0.349], [-0.018, -0.119]],
        **THREE,
    )  # fmt: skip


BIRTHS = pd.DataFrame(
    {
        "animal": range(5, 15),
        "dam": [2, 2, 6, 5, 6, 2, 7, 7, 2, 6],
        "herd": list("1111222333"),
        "pen": list("1221122212"),
        "weight": [35.0, 20, 25, 40, 42, 22, 35, 34, 20, 40],
    }
)
BIRTH_PEDIGREE = pd.DataFrame(
    {
        "animal": range(1, 15),
        "sire": [0, 0, 0, 0, 1, 3, 4, 3, 1, 3, 3, 8, 9, 3],
        "dam": [0, 0, 0, 0, *BIRTHS["dam"]],
    }
)


@pytest.mark.parametrize("solver", ["dense", "sparse"])
def test_maternal_effects(solver):
    """Example 8.1 (7.1): birth weight; direct and maternal effects are correlated."""
    G = cholesky("animal_dam/effects", [[150.0, -40], [-40, 90]])
    found = lmm(
        "weight ~ 0 + pen + herd + us(ped(animal) + ped(dam)) + (1 | dam)", BIRTHS,
        pedigree=BIRTH_PEDIGREE, categorical=["herd", "pen"], solver=solver,
        constraints={**G, "dam/sigma^2": 40.0}, residual_variance=350.0,
    )  # fmt: skip
    np.testing.assert_allclose(found.fixed.estimate, [34.540, 27.691, 3.386, 1.434], **THREE)
    np.testing.assert_allclose(
        blups(found, "animal + dam"),
        [[0.564, 0.262], [-1.244, -1.583], [1.165, 0.736], [-0.484, 0.586], [0.630, -0.507],
         [-0.859, 0.841], [-1.156, 1.299], [1.917, -0.158], [-0.553, 0.660], [-1.055, -0.153],
         [0.385, 0.916], [0.863, 0.442], [-2.980, 0.093], [1.751, 0.362]],
        **THREE,
    )  # fmt: skip
    np.testing.assert_allclose(found.random[1].values[:, 0], [-1.701, 0.415, 0.825, 0.461], **THREE)


def bulls():
    """Ten markers of bulls 13 to 26, and the daughters' yield of the first eight."""
    sire = [0] * 14 + [13, 15, 15, 14, 14, 14, 1, 14, 14, 14, 14, 14]
    dam = [0] * 14 + [4, 2, 5, 6, 9, 9, 3, 8, 11, 10, 7, 12]
    calls = [
        "2011000212", "1000020210", "1121100212", "0021010221", "0112000212", "1101020221",
        "0011020220", "0110010220", "2000012212", "0001120200", "0110010221", "1000110200",
        "0001120210", "1011020100",
    ]  # fmt: skip
    names = [str(i) for i in range(13, 27)]
    markers = pd.DataFrame(
        [[int(x) for x in row] for row in calls], names, [f"m{j}" for j in range(10)]
    )
    records = pd.DataFrame({"bull": names[:8], "fat": [9.0, 13.4, 12.7, 15.4, 5.9, 7.7, 10.2, 4.8]})
    return Pedigree.of(range(1, 27), sire, dam), markers, records


HELD = {"constraints": {"bull/sigma^2": 35.241}, "residual_variance": 245.0}


def test_genomic_relationship():
    """Example 11.3 (11.3): its first column."""
    _, markers, _ = bulls()
    p = markers.mean() / 2
    assert float(2 * (p * (1 - p)).sum()) == pytest.approx(3.5383, abs=5e-4)
    np.testing.assert_allclose(
        genomic_relationship(markers)["13"],
        [1.472, -0.446, 0.988, 0.059, 0.685, -0.163, -0.708,
         -0.547, 0.887, -0.789, -0.203, -0.143, -0.829, -0.264],
        **THREE,
    )  # fmt: skip


def test_effects_of_markers_by_either_model():
    """Examples 11.2 and 11.4 (11.2): BLUPs of markers, by BLUPF90 at a variance of 9.96."""
    _, markers, records = bulls()
    published = [
        0.08702093, -0.31079216, 0.26246003, -0.08027711, 0.11020813,
        0.13908022, 0.0, 0.0, -0.06069044, -0.01580233,
    ]  # fmt: skip
    codes = marker_codes(markers)
    gblup = lmm(
        "fat ~ 1 + (1 | vm(bull, K))", records, kernels={"K": genomic_relationship(markers)}, **HELD
    )
    values = blup_table(gblup).set_index("level")["blup"]
    p = markers.mean() / 2
    scale = float(np.sqrt(2 * (p * (1 - p)).sum()))
    back = marker_effects(codes, values) / scale  # of a copy of the allele
    np.testing.assert_allclose(back, published, atol=2e-5)
    table = records.join(codes, on="bull").assign(all="all")
    ridge = lmm(
        f"fat ~ 1 + idv(0 + {' + '.join(markers)} | all)", table,
        constraints={"all/sigma^2": 35.241}, residual_variance=245.0,
    )  # fmt: skip
    effects = blup_table(ridge).set_index("effect")["blup"]
    np.testing.assert_allclose(effects.loc[codes.columns] / scale, back, atol=1e-9)
    np.testing.assert_allclose(
        codes @ effects.loc[codes.columns], values.loc[codes.index], atol=1e-9
    )
    np.testing.assert_allclose(  # the book's values of animals with and without records
        codes @ effects.loc[codes.columns],
        [0.070, 0.111, 0.045, 0.253, -0.495, -0.357, 0.145,
         -0.224, 0.027, 0.114, -0.240, 0.143, 0.054, 0.354],
        **THREE,
    )  # fmt: skip


@pytest.mark.parametrize("solver", ["dense", "sparse"])
def test_single_step(solver):
    """Example 12.1: G brought to the base of the pedigree."""
    pedigree, markers, records = bulls()
    H = single_step_relationship(pedigree, genomic_relationship(markers), tuned=True)
    found = lmm("fat ~ 1 + (1 | ped(bull))", records, pedigree=H, solver=solver, **HELD)
    np.testing.assert_allclose(
        blups(found, "bull")[:, 0],
        [0.009, 0.121, 0.009, 0.010, -0.250, -0.196, -0.001, 0.026, -0.076, 0.040, -0.137, 0.136,
         0.048, 0.082, 0.039, 0.202, -0.356, -0.254, 0.098, -0.169, 0.018, 0.079, -0.164, 0.101,
         0.039, 0.245],
        **THREE,
    )  # fmt: skip


def test_dominance():
    """Example 13.1 (12.1): weights of pigs, variances 90, 80 and 120."""
    pedigree = Pedigree.of(
        range(1, 13), [0, 0, 0, 0, 1, 3, 6, 0, 3, 3, 6, 6], [0, 0, 0, 0, 2, 4, 5, 5, 8, 8, 8, 8]
    )
    D = pedigree.dominance()
    np.testing.assert_allclose(
        D.loc["7", list(map(str, range(7, 13)))], [1, 0, 0.0625, 0.0625, 0.125, 0.125], atol=1e-15
    )
    pigs = pd.DataFrame(
        {
            "pig": range(5, 13),
            "again": range(5, 13),
            "pen": list("11112222"),
            "weight": [17.0, 20, 18, 13.5, 20, 15, 25, 19.5],
        }
    )
    found = lmm(
        "weight ~ 0 + pen + (1 | ped(pig)) + (1 | vm(again, D))", pigs,
        pedigree=pedigree, kernels={"D": D},
        constraints={"pig/sigma^2": 90.0, "again/sigma^2": 80.0}, residual_variance=120.0,
    )  # fmt: skip
    np.testing.assert_allclose(found.fixed.estimate, [16.980, 20.030], **THREE)
    np.testing.assert_allclose(
        blups(found, "pig")[:, 0],
        [-0.160, -0.160, 0.059, 0.819, -0.320, 1.259, 0.555, -0.998, -0.350, -1.350, 1.061, -0.039],
        **THREE,
    )
    np.testing.assert_allclose(
        blups(found, "again")[:, 0],
        [0, 0, 0, 0, 0.136, 0.705, 0.237, -0.993, 0, -1.333, 1.428, -0.038], **THREE,
    )  # fmt: skip
    AA = epistatic_relationship(pedigree.relationship(), pedigree.relationship(), scaled=False)
    assert float(AA.loc["11", "12"]) == pedigree.relationship(["11", "12"]).iloc[0, 1] ** 2
