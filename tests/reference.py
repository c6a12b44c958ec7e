"""The equations of the papers as plain loops over Python floats (float64), without an import of the
package."""

import itertools
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


def compact_tokens(image, kernels):
    """The tokenizer of compact transformers (arXiv 2104.05704, equation 1): for each kernel, MaxPool(ReLU(Conv2d(x))), with 3 x 3
    windows, zeros around the image of a convolution, and pooling in steps of two.

    image: (channels, height, width). kernels: (out, in, 3, 3) each.
    """
    for kernel in kernels:
        _, height, width = image.shape
        found = np.zeros((len(kernel), height, width))
        for out, row, column in np.ndindex(found.shape):
            for channel, i, j in np.ndindex(kernel.shape[1:]):
                y, x = row + i - 1, column + j - 1
                if 0 <= y < height and 0 <= x < width:
                    found[out, row, column] += kernel[out, channel, i, j] * image[channel, y, x]
        found = np.maximum(found, 0.0)
        image = np.zeros((len(kernel), height // 2, width // 2))
        for out, row, column in np.ndindex(image.shape):
            rows = slice(max(0, 2 * row - 1), 2 * row + 2)
            image[out, row, column] = found[out, rows, max(0, 2 * column - 1) : 2 * column + 2].max()
    return image.reshape(len(image), -1).T


def locality_attention(tokens, linears, betas, alpha):
    """Locality self-attention (arXiv 2112.13492): each head has its own inverse temperature, and no token attends to itself.

    linears: (W, b) of q, k, v, output.
    """
    (wq, bq), (wk, bk), (wv, bv), (wo, bo) = linears
    width = len(bq) // len(betas)
    outputs = []
    for i, token in enumerate(tokens):
        others = [other for j, other in enumerate(tokens) if j != i]
        found = []
        for head, beta in enumerate(betas):
            part = slice(head * width, (head + 1) * width)
            query = (wq @ token + bq)[part]
            weights = entmax([beta * kernel(query, (wk @ other + bk)[part]) for other in others], alpha)
            found.append(sum(p * (wv @ other + bv)[part] for p, other in zip(weights, others, strict=True)))
        outputs.append(wo @ np.concatenate(found) + bo)
    return np.stack(outputs)


def mimetic_product(random, rank, identity, noise):
    """The matrix of a rank that is closest to M = noise Z + identity I (arXiv 2305.09828): M projected on the leading
    eigenvectors of M M^T."""
    matrix = noise * random + identity * np.eye(len(random))
    _, vectors = np.linalg.eigh(matrix @ matrix.T)
    leading = vectors[:, ::-1][:, :rank]
    return leading @ (leading.T @ matrix)


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


def _unit(vector):
    size = math.sqrt(sum(x * x for x in vector))
    return [x / size for x in vector]


def _dot(u, v):
    return sum(x * y for x, y in zip(u, v, strict=True))


def koleo_losses(features):
    """-log |Phi_mu - Phi_nu| of the nearest neighbour nu, for each memory (arXiv 1806.03198,
    equation 4), with 1e-8 added to the square."""
    normed = [_unit(each) for each in features]
    losses = []
    for mu, one in enumerate(normed):
        squares = [sum((x - y) ** 2 for x, y in zip(one, other, strict=True)) for nu, other in enumerate(normed) if nu != mu]
        losses.append(-0.5 * math.log(min(squares) + 1e-8))
    return losses


def vicreg_loss(features, copies):
    """25 s(Z, Z') + 25 [v(Z) + v(Z')] + [c(Z) + c(Z')] (arXiv 2105.04906, equations 1 to 6)."""
    count, width = len(features), len(features[0])
    loss = 25.0 * sum((x - y) ** 2 for z, w in zip(features, copies, strict=True) for x, y in zip(z, w, strict=True)) / count
    for view in (features, copies):
        means = [sum(row[j] for row in view) / count for j in range(width)]
        for i in range(width):
            for j in range(width):
                covariance = sum((row[i] - means[i]) * (row[j] - means[j]) for row in view) / (count - 1)
                loss += 25.0 * max(0.0, 1.0 - math.sqrt(covariance + 1e-4)) / width if i == j else covariance**2 / width
    return loss


def sigreg_loss(features, copies, directions, weight=0.05):
    """(1 - weight) mean (Z - mean of views)^2 + weight SIGReg (arXiv 2511.08544, algorithm 1), for
    given directions."""
    views, count = [features] if copies is None else [features, copies], len(features)
    points = [-5.0 + 10.0 * k / 16 for k in range(17)]
    total = 0.0
    for view in views:
        for direction in directions:
            projected = [_dot(row, direction) for row in view]
            gaps = []
            for t in points:
                real = sum(math.cos(t * x) for x in projected) / count
                imaginary = sum(math.sin(t * x) for x in projected) / count
                normal = math.exp(-t * t / 2)
                gaps.append(((real - normal) ** 2 + imaginary**2) * normal)
            area = sum((a + b) / 2 * 10.0 / 16 for a, b in itertools.pairwise(gaps))
            total += weight * count * area / len(directions) / len(views)
    if copies is not None:
        for z, w in zip(features, copies, strict=True):
            for x, y in zip(z, w, strict=True):
                middle = (x + y) / 2
                total += (1 - weight) * ((x - middle) ** 2 + (y - middle) ** 2) / (2 * count * len(z))
    return total


def supervised_losses(features, labels, temperature):
    """The supervised contrastive loss of each memory that has another one of its class (arXiv
    2004.11362, equation 2)."""
    normed = [_unit(each) for each in features]
    losses = []
    for mu, one in enumerate(normed):
        others = [nu for nu in range(len(normed)) if nu != mu]
        alike = [nu for nu in others if labels[nu] == labels[mu]]
        if alike:
            total = sum(math.exp(_dot(one, normed[nu]) / temperature) for nu in others)
            losses.append(-sum(math.log(math.exp(_dot(one, normed[nu]) / temperature) / total) for nu in alike) / len(alike))
    return losses


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
