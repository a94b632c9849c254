"""The Triton kernels of the stacked layers: program axis 1 is the critic, axis 0 its rows."""

# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(x, m, row, column, stride, mask):
    """Rows and columns of critic m of ``x`` [M, N, columns], 0 where ``mask`` is false."""
    return tl.load(x + m * stride[0] + row * stride[1] + column * stride[2], mask=mask, other=0.0)


@triton.jit
def row_scale(wide, h, eps):
    """One over the root mean square of each row, as a column."""
    return tl.rsqrt(tl.sum(wide * wide, axis=1) / h + eps)[:, None]


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    normed,
    summed,
    n,
    h,
    eps,
    x_m,
    x_n,
    x_h,
    residual_m,
    residual_n,
    residual_h,
    weight_m,
    weight_h,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A program owns ROWS whole rows of one critic; without a residual there is no ``summed`` either."""
    m = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK_H).to(tl.int64)[None, :]
    inside = (row < n) & (column < h)
    out = (m * n + row) * h + column
    value = load_tile(x, m, row, column, (x_m, x_n, x_h), inside)
    if residual is not None:
        more = load_tile(residual, m, row, column, (residual_m, residual_n, residual_h), inside)
        value = (value.to(tl.float32) + more.to(tl.float32)).to(summed.dtype.element_ty)
        tl.store(summed + out, value, mask=inside)
    wide = value.to(tl.float32)
    unit = (wide * row_scale(wide, h, eps)).to(value.dtype).to(tl.float32)
    w = tl.load(weight + m * weight_m + column * weight_h, mask=column < h, other=0.0).to(tl.float32)
    tl.store(normed + out, (unit * w).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def rms_norm_backward_kernel(
    grad_normed,
    grad_summed,
    summed,
    weight,
    grad_input,
    partial,
    n,
    h,
    eps,
    part_rows,
    grad_normed_m,
    grad_normed_n,
    grad_normed_h,
    grad_summed_m,
    grad_summed_n,
    grad_summed_h,
    summed_m,
    summed_n,
    summed_h,
    weight_m,
    weight_h,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A program owns one part of one critic's rows, ``part_rows``, a multiple of ROWS.

    It writes the gradient of summed there (unless ``grad_input`` is None), ``grad_summed`` (unless that is None)
    included, and what the part adds to the gradient of weight (unless ``partial`` [parts, M, h] is None). The root mean
    square is computed again: the row is at hand.
    """
    m = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * part_rows
    column = tl.arange(0, BLOCK_H).to(tl.int64)[None, :]
    in_columns = column < h
    w = tl.load(weight + m * weight_m + column * weight_h, mask=in_columns, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK_H), tl.float32)
    for start in range(0, part_rows, ROWS):
        row = first + start + tl.arange(0, ROWS)[:, None]
        inside = (row < n) & in_columns
        value = load_tile(summed, m, row, column, (summed_m, summed_n, summed_h), inside)
        g = load_tile(grad_normed, m, row, column, (grad_normed_m, grad_normed_n, grad_normed_h), inside)
        g = g.to(tl.float32)
        wide = value.to(tl.float32)
        scale = row_scale(wide, h, eps)
        unit = wide * scale
        if partial is not None:
            total += g * unit.to(value.dtype).to(tl.float32)
        if grad_input is not None:
            g *= w
            g = scale * (g - unit * (tl.sum(g * unit, axis=1) / h)[:, None])
            if grad_summed is not None:
                more = load_tile(grad_summed, m, row, column, (grad_summed_m, grad_summed_n, grad_summed_h), inside)
                g += more.to(tl.float32)
            tl.store(grad_input + (m * n + row) * h + column, g.to(grad_input.dtype.element_ty), mask=inside)
    if partial is not None:
        line = partial + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + m) * h
        tl.store(line + column, tl.sum(total, axis=0, keep_dims=True), mask=in_columns)


@triton.jit
def load_halves(at, stride, column, mask, half):
    """The two halves of the last dimension in float32; they meet in the rotation."""
    first = tl.load(at + column * stride, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(at + (half + column) * stride, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def store_halves(at, column, mask, half, first, second):
    """The two halves of the last dimension, contiguous, rounded to the dtype of the memory."""
    at += column
    tl.store(at, first.to(at.dtype.element_ty), mask=mask)
    tl.store(at + half, second.to(at.dtype.element_ty), mask=mask)


@triton.jit
def load_angles(cos, cos_d, sin, sin_d, half, HALF: tl.constexpr):
    """Cosine and sine of one token: the two halves of each."""
    column = tl.arange(0, HALF).to(tl.int64)[None, :]
    cosines = load_halves(cos, cos_d, column, column < half, half)
    sines = load_halves(sin, sin_d, column, column < half, half)
    return cosines, sines


@triton.jit
def head_scale(first, second, half, eps):
    """One over the root mean square of each head, as a column."""
    squares = tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)
    return tl.rsqrt(squares / (2 * half) + eps)[:, None]


@triton.jit
def rotate_heads(
    x,
    x_stride,
    weight,
    weight_d,
    out,
    angles,
    heads,
    half,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Norm (unless ``weight`` is None) and rotate all heads of one token, HEADS at a time.

    ``x_stride`` is that of a head and of a dimension, ``angles`` what ``load_angles`` returns.
    """
    cos, sin = angles
    column = tl.arange(0, HALF).to(tl.int64)[None, :]
    if weight is not None:
        w_first, w_second = load_halves(weight, weight_d, column, column < half, half)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS).to(tl.int64)[:, None]
        inside = (head < heads) & (column < half)
        first, second = load_halves(x + head * x_stride[0], x_stride[1], column, inside, half)
        if weight is not None:
            kind = x.dtype.element_ty
            scale = head_scale(first, second, half, eps)
            first = (first * scale).to(kind).to(tl.float32) * w_first
            second = (second * scale).to(kind).to(tl.float32) * w_second
            if weight.dtype.element_ty == kind:  # else torch promotes to float32, and nothing is rounded
                first = first.to(kind).to(tl.float32)
                second = second.to(kind).to(tl.float32)
        to = out + head * 2 * half
        store_halves(to, column, inside, half, first * cos[0] - second * sin[0], second * cos[1] + first * sin[1])


@triton.jit
def qk_norm_rope_kernel(
    q,
    k,
    cos,
    sin,
    q_weight,
    k_weight,
    q_out,
    k_out,
    n,
    q_heads,
    k_heads,
    half,
    eps,
    q_m,
    q_n,
    q_h,
    q_d,
    k_m,
    k_n,
    k_h,
    k_d,
    cos_m,
    cos_n,
    cos_d,
    sin_m,
    sin_n,
    sin_d,
    q_weight_m,
    q_weight_d,
    k_weight_m,
    k_weight_d,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """A program owns all heads, of query and key, of one token of one critic: cosine and sine are read once."""
    m = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0).to(tl.int64)
    angles = load_angles(cos + m * cos_m + token * cos_n, cos_d, sin + m * sin_m + token * sin_n, sin_d, half, HALF)
    q += m * q_m + token * q_n
    k += m * k_m + token * k_n
    if q_weight is not None:
        q_weight += m * q_weight_m
    if k_weight is not None:
        k_weight += m * k_weight_m
    q_out += (m * n + token) * q_heads * 2 * half
    k_out += (m * n + token) * k_heads * 2 * half
    rotate_heads(q, (q_h, q_d), q_weight, q_weight_d, q_out, angles, q_heads, half, eps, Q_HEADS, HALF)
    rotate_heads(k, (k_h, k_d), k_weight, k_weight_d, k_out, angles, k_heads, half, eps, K_HEADS, HALF)


@triton.jit
def unrotate_heads(
    grad,
    grad_stride,
    x,
    x_stride,
    weight,
    weight_d,
    out,
    total,
    angles,
    heads,
    half,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """The gradient of ``rotate_heads``; returns ``total`` with this token's share in the gradient of weight added.

    The strides are those of a head and of a dimension; ``total`` has two halves, as the angles.
    """
    cos, sin = angles
    total_first, total_second = total
    column = tl.arange(0, HALF).to(tl.int64)[None, :]
    if weight is not None:
        w_first, w_second = load_halves(weight, weight_d, column, column < half, half)
    for start in range(0, heads, HEADS):
        head = start + tl.arange(0, HEADS).to(tl.int64)[:, None]
        inside = (head < heads) & (column < half)
        up_first, up_second = load_halves(grad + head * grad_stride[0], grad_stride[1], column, inside, half)
        first = up_first * cos[0] + up_second * sin[1]
        second = up_second * cos[1] - up_first * sin[0]
        if weight is not None:
            kind = x.dtype.element_ty
            x_first, x_second = load_halves(x + head * x_stride[0], x_stride[1], column, inside, half)
            scale = head_scale(x_first, x_second, half, eps)
            x_first *= scale
            x_second *= scale
            total_first += first * x_first.to(kind).to(tl.float32)
            total_second += second * x_second.to(kind).to(tl.float32)
            first *= w_first
            second *= w_second
            dot = tl.sum(first * x_first, axis=1) + tl.sum(second * x_second, axis=1)
            dot = (dot / (2 * half))[:, None]
            first = scale * (first - x_first * dot)
            second = scale * (second - x_second * dot)
        store_halves(out + head * 2 * half, column, inside, half, first, second)
    return total_first, total_second


@triton.jit
def store_total(partial, total, half, HALF: tl.constexpr):
    """What one part adds to the gradient of one critic's weight [D]."""
    column = tl.arange(0, HALF)
    store_halves(partial, column, column < half, half, tl.sum(total[0], axis=0), tl.sum(total[1], axis=0))


@triton.jit
def qk_norm_rope_backward_kernel(
    grad_q,
    grad_k,
    q,
    k,
    cos,
    sin,
    q_weight,
    k_weight,
    q_out,
    k_out,
    q_partial,
    k_partial,
    n,
    q_heads,
    k_heads,
    half,
    eps,
    part_tokens,
    grad_q_m,
    grad_q_n,
    grad_q_h,
    grad_q_d,
    grad_k_m,
    grad_k_n,
    grad_k_h,
    grad_k_d,
    q_m,
    q_n,
    q_h,
    q_d,
    k_m,
    k_n,
    k_h,
    k_d,
    cos_m,
    cos_n,
    cos_d,
    sin_m,
    sin_n,
    sin_d,
    q_weight_m,
    q_weight_d,
    k_weight_m,
    k_weight_d,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
):
    """A program owns one part of one critic's tokens.

    It writes the gradients of q and k there to ``q_out`` and ``k_out``, and what the part adds to those of the weights
    (unless ``q_partial`` or ``k_partial`` [parts, M, D] is None). q or k itself is None where there is no weight.
    """
    m = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * part_tokens
    if q_weight is not None:
        q_weight += m * q_weight_m
    if k_weight is not None:
        k_weight += m * k_weight_m
    q_total = tl.zeros((Q_HEADS, HALF), tl.float32), tl.zeros((Q_HEADS, HALF), tl.float32)
    k_total = tl.zeros((K_HEADS, HALF), tl.float32), tl.zeros((K_HEADS, HALF), tl.float32)
    for token in range(first, tl.minimum(first + part_tokens, n)):
        angles = load_angles(cos + m * cos_m + token * cos_n, cos_d, sin + m * sin_m + token * sin_n, sin_d, half, HALF)
        q_total = unrotate_heads(
            grad_q + m * grad_q_m + token * grad_q_n,
            (grad_q_h, grad_q_d),
            q if q is None else q + m * q_m + token * q_n,
            (q_h, q_d),
            q_weight,
            q_weight_d,
            q_out + (m * n + token) * q_heads * 2 * half,
            q_total,
            angles,
            q_heads,
            half,
            eps,
            Q_HEADS,
            HALF,
        )
        k_total = unrotate_heads(
            grad_k + m * grad_k_m + token * grad_k_n,
            (grad_k_h, grad_k_d),
            k if k is None else k + m * k_m + token * k_n,
            (k_h, k_d),
            k_weight,
            k_weight_d,
            k_out + (m * n + token) * k_heads * 2 * half,
            k_total,
            angles,
            k_heads,
            half,
            eps,
            K_HEADS,
            HALF,
        )
    line = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + m) * 2 * half
    if q_partial is not None:
        store_total(q_partial + line, q_total, half, HALF)
    if k_partial is not None:
        store_total(k_partial + line, k_total, half, HALF)


@triton.jit
def add_parts_kernel(
    partial,
    first,
    second,
    parts,
    columns,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program adds BLOCK_C columns over all parts, in the same order whatever the device.

    ``partial`` is [1 or 2, parts, columns] for a weight or, along program axis 1, two.
    """
    which = tl.program_id(1)
    partial += which.to(tl.int64) * parts * columns
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, parts, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        at = partial + part[:, None].to(tl.int64) * columns + column[None, :]
        total += tl.load(at, mask=(part < parts)[:, None] & (column < columns)[None, :], other=0.0)
    result = tl.sum(total, axis=0)
    if which == 0:
        tl.store(first + column, result.to(first.dtype.element_ty), mask=column < columns)
    elif second is not None:
        tl.store(second + column, result.to(second.dtype.element_ty), mask=column < columns)


@triton.jit
def element_tile(n, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The critic, rows, columns and mask of a program that owns ROWS rows and BLOCK columns of one critic."""
    m = tl.program_id(1).to(tl.int64)
    slices = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // slices).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = (tl.program_id(0) % slices).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :]
    return m, row, column, (row < n) & (column < width)


@triton.jit
def swiglu_kernel(
    gate,
    up,
    out,
    n,
    width,
    gate_m,
    gate_n,
    gate_i,
    up_m,
    up_n,
    up_i,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns a tile of ROWS rows and BLOCK columns of one critic."""
    m, row, column, inside = element_tile(n, width, ROWS, BLOCK)
    g = load_tile(gate, m, row, column, (gate_m, gate_n, gate_i), inside).to(tl.float32)
    u = load_tile(up, m, row, column, (up_m, up_n, up_i), inside).to(tl.float32)
    kind = out.dtype.element_ty
    result = (g * tl.sigmoid(g)).to(kind).to(tl.float32) * u
    tl.store(out + (m * n + row) * width + column, result.to(kind), mask=inside)


@triton.jit
def swiglu_backward_kernel(
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    n,
    width,
    grad_m,
    grad_n,
    grad_i,
    gate_m,
    gate_n,
    gate_i,
    up_m,
    up_n,
    up_i,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns a tile of ROWS rows and BLOCK columns of one critic; silu(gate) is computed again."""
    m, row, column, inside = element_tile(n, width, ROWS, BLOCK)
    dy = load_tile(grad, m, row, column, (grad_m, grad_n, grad_i), inside).to(tl.float32)
    g = load_tile(gate, m, row, column, (gate_m, gate_n, gate_i), inside).to(tl.float32)
    u = load_tile(up, m, row, column, (up_m, up_n, up_i), inside).to(tl.float32)
    kind = grad_gate.dtype.element_ty
    sigmoid = tl.sigmoid(g)
    out = (m * n + row) * width + column
    tl.store(grad_up + out, (dy * (g * sigmoid).to(kind).to(tl.float32)).to(kind), mask=inside)
    tl.store(grad_gate + out, (dy * u * sigmoid * (1 + g * (1 - sigmoid))).to(kind), mask=inside)


@triton.jit
def embedding_kernel(
    tokens,
    weight,
    inputs,
    projection,
    out,
    n,
    h,
    tokens_m,
    tokens_n,
    weight_m,
    weight_v,
    weight_h,
    inputs_m,
    inputs_n,
    inputs_f,
    projection_m,
    projection_f,
    projection_h,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns a tile of ROWS rows and BLOCK columns of one critic; what all critics share has a stride of 0."""
    m, row, column, inside = element_tile(n, h, ROWS, BLOCK)
    token = tl.load(tokens + m * tokens_m + row * tokens_n, mask=row < n, other=0)
    at = weight + m * weight_m + token * weight_v + column * weight_h
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    for feature in tl.static_range(FEATURES):
        x = tl.load(inputs + m * inputs_m + row * inputs_n + feature * inputs_f, mask=row < n, other=0.0)
        w = projection + m * projection_m + feature * projection_f + column * projection_h
        value += x * tl.load(w, mask=column < h, other=0.0).to(tl.float32)
    tl.store(out + (m * n + row) * h + column, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def embedding_backward_kernel(
    grad,
    inputs,
    partial,
    n,
    h,
    features,
    part_rows,
    grad_m,
    grad_n,
    grad_h,
    inputs_m,
    inputs_n,
    inputs_f,
    FEATURES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program owns BLOCK columns of one part of one critic's rows, ``part_rows``, a multiple of ROWS.

    It writes what the part adds to the gradient of the projection to ``partial`` [parts, M, features, h].
    """
    m = tl.program_id(1).to(tl.int64)
    slices = tl.cdiv(h, BLOCK)
    part = (tl.program_id(0) // slices).to(tl.int64)
    column = (tl.program_id(0) % slices).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    feature = tl.arange(0, FEATURES)
    total = tl.zeros((FEATURES, ROWS, BLOCK), tl.float32)
    for start in range(0, part_rows, ROWS):
        row = part * part_rows + start + tl.arange(0, ROWS)
        at = grad + m * grad_m + row[:, None] * grad_n + column[None, :] * grad_h
        g = tl.load(at, mask=(row < n)[:, None] & (column < h)[None, :], other=0.0).to(tl.float32)
        at = inputs + m * inputs_m + row[None, :] * inputs_n + feature[:, None] * inputs_f
        x = tl.load(at, mask=(row < n)[None, :] & (feature < features)[:, None], other=0.0)
        total += x[:, :, None] * g[None, :, :]
    line = partial + (part * tl.num_programs(1) + m) * features * h
    inside = (feature < features)[:, None] & (column < h)[None, :]
    tl.store(line + feature[:, None] * h + column[None, :], tl.sum(total, axis=1), mask=inside)
