"""The equations of the papers as plain loops over Python floats (float64), without an import of the
package."""

import math

import numpy as np


def entmax(scores, alpha):
    """argmax_p <p, z> + H_alpha(p) over the simplex: p_i = [(alpha - 1) z_i - tau]_+^(1 / (alpha -
    1)), tau by bisection; softmax at 1."""
    if alpha == 1.0:
        top = max(scores)
        weights = [math.exp(z - top) for z in scores]
        return np.array(weights) / sum(weights)
    scaled = [(alpha - 1.0) * z for z in scores]
    low, high = max(scaled) - 1.0, max(scaled)
    for _ in range(200):
        middle = 0.5 * (low + high)
        total = sum(max(x - middle, 0.0) ** (1.0 / (alpha - 1.0)) for x in scaled)
        low, high = (middle, high) if total >= 1.0 else (low, middle)
    weights = [max(x - low, 0.0) ** (1.0 / (alpha - 1.0)) for x in scaled]
    return np.array(weights) / sum(weights)


def tsallis_negentropy(weights, alpha):
    """Omega_alpha(p) = sum (p^alpha - p) / (alpha (alpha - 1)), sum p log p at 1."""
    if alpha == 1.0:
        return sum(p * math.log(p) for p in weights if p > 0)
    return sum(p**alpha - p for p in weights) / (alpha * (alpha - 1.0))


def conjugate(scores, alpha):
    """Psi*(z) = <p, z> - Omega(p) at p = entmax(z)."""
    weights = entmax(scores, alpha)
    return sum(p * z for p, z in zip(weights, scores, strict=True)) - tsallis_negentropy(weights, alpha)


def kernel(u, v, matrix=None):
    """K(u, v) = <W u, W v> (2.1)."""
    if matrix is not None:
        u, v = matrix @ u, matrix @ v
    return sum(a * b for a, b in zip(u, v, strict=True))


def energy(query, memories, beta, alpha, matrix=None):
    """E(x) = K(x, x) / 2 - Psi*_alpha(beta, K(Xi, x)) (2.2), with Psi*_alpha(beta, z) =
    Psi*_alpha(beta z) / beta."""
    scores = [beta * kernel(memory, query, matrix) for memory in memories]
    return 0.5 * kernel(query, query, matrix) - conjugate(scores, alpha) / beta


def retrieve(query, memories, beta, alpha, matrix=None, steps=1):
    """T(x) = sum_mu p_mu xi_mu (2.4), steps times."""
    for _ in range(steps):
        weights = entmax([beta * kernel(memory, query, matrix) for memory in memories], alpha)
        query = sum(p * memory for p, memory in zip(weights, memories, strict=True))
    return query


def attention(query, keys, values, alpha, scaling, bias=None, softcap=None, sink=None):
    """Attention of one query and one head: Sep_alpha of its scores (3.1), with a cap, a bias (-inf:
    absent) and a sink without content."""
    scores = [scaling * kernel(key, query) for key in keys]
    if softcap is not None:
        scores = [softcap * math.tanh(z / softcap) for z in scores]
    present = [i for i in range(len(keys)) if bias is None or bias[i] > -math.inf]
    shown = [scores[i] + (0.0 if bias is None else bias[i]) for i in present] + ([] if sink is None else [sink])
    output = np.zeros(len(values[0]))
    if shown:
        weights = entmax(shown, alpha)
        for weight, i in zip(weights, present, strict=False):
            output = output + weight * values[i]
    return output


def separation_loss(features, kind, t):
    """(2.6), (3.2), G.2 and the loss of U-Hop+ over unit-norm features, with tau = 1 / (2 t)."""
    unit = [feature / math.sqrt(sum(f * f for f in feature)) for feature in features]
    count = len(unit)
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    if kind == "average":
        return math.log(sum(math.exp(-t * sum((unit[i] - unit[j]) ** 2)) for i, j in pairs) / len(pairs))
    if kind == "squared":
        return math.log(sum(math.exp(2 * t * (kernel(unit[i], unit[j]) ** 2 - 1)) for i, j in pairs) / len(pairs))
    if kind == "nearest":
        return max(-t * sum((unit[i] - unit[j]) ** 2) for i, j in pairs)
    rows = [math.log(sum(math.exp(2 * t * kernel(unit[i], unit[j])) for j in range(count) if j != i)) for i in range(count)]
    return sum(rows) / count


def hopfield_layer(states, memories, phi, wq, wk, wv, beta, alpha, projected_values=False):
    """One head of Sep_alpha[beta (W_Q Phi(x)) (W_K Phi(Xi))^T] V (3.1), with V = W_V Xi or W_V W_K
    Xi.

    Rows are tokens; biases are zero.
    """
    outputs = []
    for state in states:
        query = wq @ (phi @ state)
        scores = [beta * kernel(query, wk @ (phi @ memory)) for memory in memories]
        weights = entmax(scores, alpha)
        values = [wv @ (wk @ memory) if projected_values else wv @ memory for memory in memories]
        outputs.append(sum(p * value for p, value in zip(weights, values, strict=True)))
    return np.stack(outputs)


def layer_norm(vector, norm, eps):
    weight, bias = norm
    mean = sum(vector) / len(vector)
    variance = sum((v - mean) ** 2 for v in vector) / len(vector)
    return np.array([(v - mean) / math.sqrt(variance + eps) * w + b for v, w, b in zip(vector, weight, bias, strict=True)])


def hopfield_pooling(queries, items, norms, projections, heads, beta, alpha, steps, eps):
    """HopfieldPooling (Ramsauer et al. 2020): layer norms of state and patterns, projections with
    bias, and attention of each head.

    Args:
        norms: (weight, bias) of the layer norms of queries, memories and contents.
        projections: (W, b) of q, k, v and the output.
    """
    states = [layer_norm(query, norms[0], eps) for query in queries]
    stored = [layer_norm(item, norms[1], eps) for item in items]
    contents = [layer_norm(item, norms[2], eps) for item in items]
    (wq, bq), (wk, bk), (wv, bv), (wo, bo) = projections
    width = len(bq) // heads
    outputs = []
    for state in states:
        found = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            query = (wq @ state + bq)[part]
            keys = [(wk @ item + bk)[part] for item in stored]
            values = [(wv @ item + bv)[part] for item in contents]
            for _ in range(steps - 1):
                weights = entmax([beta * kernel(query, key) for key in keys], alpha)
                query = sum(p * key for p, key in zip(weights, keys, strict=True))
            weights = entmax([beta * kernel(query, key) for key in keys], alpha)
            found.append(sum(p * value for p, value in zip(weights, values, strict=True)))
        outputs.append(wo @ np.concatenate(found) + bo)
    return np.stack(outputs)


def attend(states, memories, linears, heads, beta, alpha, phi=None):
    """Multi-head GSH of STanHop: q = W_Q Phi(R), k = W_K Phi(Y), v = W_V (W_K Y), each with bias;
    linears: (W, b) of q, k, v, output."""
    (wq, bq), (wk, bk), (wv, bv), (wo, bo) = linears
    width = len(bq) // heads
    outputs = []
    for state in states:
        found = []
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            query = (wq @ (state if phi is None else phi @ state) + bq)[part]
            keys = [(wk @ (memory if phi is None else phi @ memory) + bk)[part] for memory in memories]
            values = [(wv @ (wk @ memory + bk) + bv)[part] for memory in memories]
            weights = entmax([beta * kernel(query, key) for key in keys], alpha)
            found.append(sum(p * value for p, value in zip(weights, values, strict=True)))
        outputs.append(wo @ np.concatenate(found) + bo)
    return np.stack(outputs)


def cycle_residual(values, cycle, index, first, sign):
    """values_t + sign Q_{(index + first + t) mod W} for a window (T, C) and a cycle Q (W, C); CycleNet
    (arXiv 2409.18479)."""
    rows = []
    for step, row in enumerate(values):
        position = (index + first + step) % len(cycle)
        rows.append([value + sign * cycle[position][channel] for channel, value in enumerate(row)])
    return np.array(rows)


def cycle_gradient(past_gradients, forecast_gradients, cycle, indices):
    """The gradient of a loss in Q: minus those in the past without the cycle, plus those in the
    forecast, each at its position."""
    gradient = np.zeros_like(cycle)
    for past, forecast, index in zip(past_gradients, forecast_gradients, indices, strict=True):
        for step, row in enumerate(past):
            gradient[(index + step) % len(cycle)] -= row
        for step, row in enumerate(forecast):
            gradient[(index + len(past) + step) % len(cycle)] += row
    return gradient


def conformal_quantile(errors, weights, level):
    """The smallest error q with N / (N + 1) sum_i p_i [e_i <= q] >= level; infinite if none."""
    count = len(errors)
    for candidate in sorted(errors):
        mass = sum(weight for error, weight in zip(errors, weights, strict=True) if error <= candidate)
        if count / (count + 1) * mass >= level - 1e-9:
            return candidate
    return math.inf
