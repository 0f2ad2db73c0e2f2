"""Faults of covariance matrices, operators and what the likelihood sees of them."""

from tests.faults.fault import Fault

VALUES = "tests/covariance/test_values.py"
LEAVES = "tests/covariance/test_gradients.py -k 'each_leaf or special_points'"
PULLBACK = "tests/covariance/test_gradients.py -k 'pullback_equals or manual_grad_equals'"
PLACES = "tests/covariance/test_gradients.py -k two_places"
STRUCTURES = "tests/covariance/test_structures.py"

AUTOREGRESSIVE = "openreml_nn/covariance/autoregressive.py"
EXCHANGEABLE = "openreml_nn/covariance/exchangeable.py"
CORRELATION = "openreml_nn/covariance/correlation.py"
KNOWN = "openreml_nn/terms/kernel.py"
PEDIGREE = "openreml_nn/covariance/ancestry.py"
GENOMIC = "openreml_nn/covariance/genomic.py"
RELATIVES = "openreml_nn/covariance/pedigree.py"
PRODUCT = "openreml_nn/covariance/product.py"
TERM = "openreml_nn/terms/term.py"
TERMS = "openreml_nn/terms/covariance.py"
TRIANGULAR = "openreml_nn/covariance/triangular.py"
TREE = "openreml_nn/covariance/tree.py"


FAULTS = [
    Fault(
        "AR(1) forgets the sign of its correlation",
        AUTOREGRESSIVE,
        "return _banded(variance * self._powers(rho))",
        "return _banded(variance * self._powers(rho.abs()))",
        VALUES,
    ),
    Fault(
        "the derivative of a power of rho lacks the lag",
        AUTOREGRESSIVE,
        "lag * powers[:-1]",
        "(lag > 0) * powers[:-1]",
        LEAVES,
    ),
    Fault(
        "the pull-back of a Toeplitz matrix lacks the variance",
        AUTOREGRESSIVE,
        "variance * sums[1:]",
        "sums[1:]",
        LEAVES,
    ),
    Fault(
        "the pull-back of antedependence is of the next occasion",
        "openreml_nn/covariance/antedependence.py",
        "by_rho = (upper[:, :-1] * after).sum(0)",
        "by_rho = (upper[:, 1:] * after).sum(0)",
        LEAVES,
    ),
    Fault(
        "compound symmetry is bounded by -1/n",
        EXCHANGEABLE,
        "-1 / (n - 1) if n > 1",
        "-1 / n if n > 1",
        VALUES,
    ),
    Fault(
        "the pull-back of compound symmetry lacks rho",
        EXCHANGEABLE,
        "on + rho * off",
        "on + off",
        LEAVES,
    ),
    Fault(
        "Matérn 5/2 has a third in place of a half in its derivative",
        CORRELATION,
        "return s * s * (1 + s) / 3 * torch.exp(-s)",
        "return s * s * (1 + s) / 2 * torch.exp(-s)",
        LEAVES,
    ),
    Fault(
        "the Gaussian kernel lacks its half",
        CORRELATION,
        "return torch.exp(-r * r / 2)",
        "return torch.exp(-r * r)",
        VALUES,
    ),
    Fault(
        "inbred parents are taken for outbred ones",
        PEDIGREE,
        "np.where(parents >= 0, 0.25 * (1 + F[parents]), 0.0)",
        "np.where(parents >= 0, 0.25 * (1 + 0 * F[parents]), 0.0)",
        "tests/covariance/test_pedigree.py",
    ),
    Fault(
        "a pedigree's inverse has sampling variances for weights",
        PEDIGREE,
        "weight = 1 / sampling",
        "weight = sampling",
        "tests/covariance/test_pedigree.py",
    ),
    Fault(
        "a missing call is one of no copies",
        GENOMIC,
        "W[np.isnan(x)] = 0.0",
        "W[np.isnan(x)] = (0 * W - 2 * p)[np.isnan(x)]",
        "tests/covariance/test_genomic.py",
    ),
    Fault(
        "dominance takes one homozygote for the other",
        GENOMIC,
        "np.where(x == 0, -2 * p * p, np.where(x == 1, 2 * p * q, -2 * q * q))",
        "np.where(x == 0, -2 * q * q, np.where(x == 1, 2 * p * q, -2 * p * p))",
        "tests/covariance/test_genomic.py",
    ),
    Fault(
        "the second G of VanRaden has the scale of the first",
        GENOMIC,
        '"vanraden2": np.ones(len(h))',
        '"vanraden2": h',
        "tests/covariance/test_genomic.py",
    ),
    Fault(
        "effects of markers are of the other side's eigenvectors",
        GENOMIC,
        "right = u if n <= m else W.T @ u",
        "right = u if n <= m else W.T @ u / size.sum()",
        "tests/covariance/test_genomic.py",
    ),
    Fault(
        "single step weighs the inverse of A22 by tau",
        "openreml_nn/covariance/single_step.py",
        'omega * _inverse("A22", A22)',
        'tau * _inverse("A22", A22)',
        "tests/covariance/test_genomic.py",
    ),
    Fault(
        "groups of unknown parents have the variance for its inverse",
        RELATIVES,
        "torch.full((k,), 1 / variance",
        "torch.full((k,), variance",
        "tests/covariance/test_pedigree.py",
    ),
    Fault(
        "dominance takes sire for dam on one side",
        RELATIVES,
        "across * across.T",
        "across * across",
        "tests/covariance/test_pedigree.py",
    ),
    Fault(
        "a product with A forgets sampling",
        PEDIGREE,
        "x[i, j] *= sampling[i]",
        "x[i, j] *= 1.0",
        "tests/covariance/test_pedigree.py",
    ),
    Fault(
        "genes of a group are passed on whole",
        PEDIGREE,
        "shares[i] += 0.5 * shares[parent]",
        "shares[i] += shares[parent]",
        "tests/covariance/test_pedigree.py",
    ),
    Fault(
        "Legendre polynomials have the norm of their integral",
        "openreml_nn/table/bases.py",
        "columns * np.sqrt(np.arange(degree + 1) + 0.5)",
        "columns * (np.arange(degree + 1) + 0.5)",
        "tests/table/test_values.py -k legendre",
    ),
    Fault(
        "the derivative of exp(2x) lacks its 2",
        "openreml_nn/covariance/transform/elementary.py",
        "return 2 * torch.exp(2 * check_tensor(x))",
        "return torch.exp(2 * check_tensor(x))",
        "tests/covariance/test_transform.py",
    ),
    Fault(
        "a chain takes derivatives at its end",
        "openreml_nn/covariance/transform/chain.py",
        "slope = slope * element.grad(x)\n            x = element(x)",
        "x = element(x)\n            slope = slope * element.grad(x)",
        "tests/covariance/test_transform.py",
    ),
    Fault(
        "a variance's coordinate is the variance",
        "openreml_nn/covariance/transform/elementary.py",
        "return u * u",
        "return u",
        "tests/covariance/test_transform.py",
    ),
    Fault(
        "an entry off the diagonal is pulled back once",
        TRIANGULAR,
        "folded = cotangent + cotangent.triu(1).mT",
        "folded = cotangent",
        LEAVES,
    ),
    Fault(
        "the pull-back of a Cholesky factor takes the cotangent for symmetric",
        TRIANGULAR,
        "pulled = (cotangent + cotangent.mT) @ self.factor(free_params)",
        "pulled = 2 * cotangent @ self.factor(free_params)",
        LEAVES,
    ),
    Fault(
        "the pull-back of a sandwich takes the cotangent for symmetric",
        "openreml_nn/covariance/propagation.py",
        "cotangent @ (z @ g.mT) + cotangent.mT @ (z @ g)",
        "2 * cotangent @ (z @ g)",
        PULLBACK,
    ),
    Fault(
        "the pull-back of an inverse has the wrong sign",
        PRODUCT,
        "return [-(inverse @ cotangent @ inverse)]",
        "return [inverse @ cotangent @ inverse]",
        PULLBACK,
    ),
    Fault(
        "the pull-back of a Gram matrix counts one side",
        PRODUCT,
        "self._left((cotangent + cotangent.mT) @ self._left(values[0]))",
        "self._left(2 * cotangent @ self._left(values[0]))",
        PULLBACK,
    ),
    Fault(
        "the pull-back of a product forgets what stands on the left",
        PRODUCT,
        "pulled.append(part if left is None else left.mT @ part)",
        "pulled.append(part if left is None else left @ part)",
        PULLBACK,
    ),
    Fault(
        "weights multiply the variance",
        "openreml_nn/covariance/structures.py",
        "n, weights.rsqrt())",
        "n, weights.sqrt())",
        STRUCTURES + " -k weights_divide",
    ),
    Fault(
        "positions within groups are in the order of their appearance",
        "openreml_nn/covariance/structures.py",
        '_labels(positions, "positions"), sort=True)',
        '_labels(positions, "positions"))',
        STRUCTURES,
    ),
    Fault(
        "labels are in the order of their appearance",
        "openreml_nn/covariance/dummy.py",
        "else sorted(c.unique().tolist(), key=lambda value: _sort_key((value,)))",
        "else c.unique().tolist()",
        "tests/covariance/test_dummy.py",
    ),
    Fault(
        "the levels of a Kronecker product stand effect by effect",
        "openreml_nn/covariance/kronecker.py",
        "row % levels * effects + row // levels",
        "row // levels + row % levels * levels",
        "tests/likelihood/test_spectral.py -k kronecker_products_lower",
    ),
    Fault(
        "the derivative of a Kronecker product moves one side",
        TERMS,
        "return kronecker(dA, B, x) + kronecker(A, dB, x)",
        "return kronecker(dA, B, x)",
        "tests/covariance/test_terms.py",
    ),
    Fault(
        "the log-determinant of a kernel is that of its inverse",
        KNOWN,
        "return -factor.log_det",
        "return factor.log_det",
        "tests/likelihood/test_krylov.py -k relatives_by_a_sparse_inverse",
    ),
    Fault(
        "a row of no level has the values of the first",
        "openreml_nn/terms/design.py",
        "kept[:, None] if values is None else values * kept[:, None]",
        "kept[:, None] if values is None else values",
        "tests/covariance/test_dummy.py",
    ),
    Fault(
        "rows of a diagonal covariance are not taken",
        "openreml_nn/terms/covariance.py",
        "DiagonalCovariance(self.matrix[rows])",
        "DiagonalCovariance(self.matrix[: len(rows)])",
        STRUCTURES,
    ),
    Fault(
        "a Toeplitz matrix lacks its variance",
        AUTOREGRESSIVE,
        "variance, rho = self._natural(free_params)\n        return self._by_lag(variance * rho)",
        "variance, rho = self._natural(free_params)\n        return self._by_lag(rho)",
        VALUES,
    ),
    Fault(
        "a correlation beyond 1 is mirrored to the other end",
        "openreml_nn/covariance/transform/elementary.py",
        "copysign(pi, u) - u",
        "u - copysign(pi, u)",
        "tests/covariance/test_transform.py",
    ),
    Fault(
        "the inverse of a correlation's coordinate lacks its 2",
        "openreml_nn/covariance/transform/elementary.py",
        "return 2 * torch.log(t.abs() / rest.abs())",
        "return torch.log(t.abs() / rest.abs())",
        "tests/covariance/test_transform.py",
    ),
    Fault(
        "a standard deviation's coordinate is its root",
        "openreml_nn/covariance/transform/elementary.py",
        "torch.exp(self._rate * x / self.degree) if",
        "torch.exp(self._rate * x / 2) if",
        "tests/covariance/test_transform.py",
    ),
    Fault(
        "an odd root of a negative number is positive",
        "openreml_nn/covariance/transform/elementary.py",
        "value.sign() * torch.pow(value.abs(),",
        "torch.pow(value.abs(),",
        "tests/covariance/test_transform.py",
    ),
    Fault(
        "a chain's coordinate is taken for the element's before it",
        "openreml_nn/covariance/transform/chain.py",
        "return self._back(self.chain[self._kept].from_coordinate(u), self._kept)",
        "return self.chain[self._kept].from_coordinate(u)",
        "tests/covariance/test_transform.py",
    ),
    Fault(
        "a chain with an upper end vanishes",
        "openreml_nn/covariance/transform/chain.py",
        "self._vanishes = reached and bounded",
        "self._vanishes = reached",
        "tests/covariance/test_transform.py",
    ),
    Fault(
        "NaN has an inverse",
        "openreml_nn/covariance/transform/base.py",
        "outside = ~((value >= low) & (value <= high))",
        "outside = (value < low) | (value > high)",
        "tests/covariance/test_transform.py",
    ),
    Fault(
        "a node under two operators is pulled back once",
        TREE,
        "bars[o] = bars[o] + part if o in bars else part",
        "bars[o] = part",
        PLACES,
    ),
    Fault(
        "a leaf under two recorded nodes is pulled back once",
        TREE,
        "found[j] = found[j] + pulled if j in found else pulled",
        "found[j] = pulled",
        PLACES,
    ),
    Fault(
        "the Jacobian counts a node under two operators once",
        TREE,
        "mine[j] = mine[j] + part if j in mine else part",
        "mine[j] = part",
        PLACES,
    ),
    Fault(
        "a push-forward counts a node under two operators once",
        TREE,
        "moved[i] = moved[i] + part if i in moved else part",
        "moved[i] = part",
        PLACES,
    ),
    Fault(
        "a variance function at other values estimates what was fixed",
        "openreml_nn/covariance/variance.py",
        "made.fix(name, self.get_buffer(name))",
        "continue",
        "tests/covariance/test_variance.py -k same_function",
    ),
]
