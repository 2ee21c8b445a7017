"""The compiled kernel of the views: the linear maps of linear.py for a batch of images in one call, in numba.

Each image is laid on its side once, as columns [W][H * C] of bytes; then, a view at a time, every step is the same sum over a
few taps of pieces of memory that lie next to one another: across (a strip of eight columns of the view, turned back into
rows), down, and the two directions of the blur.  Colours, clipping, rounding and solarisation are made a row at a time.

The sums are written as vectors in LLVM's language: numba cannot tell LLVM that two arrays do not overlap, and without that
its loops over pixels are two to four times as slow.  No step depends on how wide the machine's vectors are: every pixel's sum
runs over its taps in order, in float32, multiplication and addition rounded one by one (never fused), and exp, sin and cos
are our own, from sums and products.  So a view has the same bytes on every CPU, in every batch and thread.

It holds no lock of Python's, and uses one thread.  numba compiles it in some seconds, once a machine (compiled.py).  All of
it stands in this one file because numba compiles anew when this file changes, and not when another one does.

Memory beside the views: the bytes of one image, and 4 bytes for C * size_px * (rows of its highest crop).
"""

import math
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ssl_ray.views.compiled import inner, loader

LANES = 16
"""float32 in a vector; rows are worked in pieces of it, and buffers end with as many to spare."""
WIDE = 64
"""The same where a row is long enough: four sums at once hide the time an addition takes."""
BLOCK = 8
"""Columns of a strip."""
BRIGHTNESS, CONTRAST, SATURATION, HUE, SIGMA = range(5)
FLIP, GRAY, SOLARIZE = range(3)
TOP, LEFT, HEIGHT, WIDTH = range(4)
TAIL = 2.0**-18
"""The weight of a Gaussian's ends that are left out: .001 of a level at most."""


# --- vectors --------------------------------------------------------------------------------------------------------------


def _pointer(context, builder, array_type, array, index, lanes: int):
    """Of `lanes` elements of a one-dimensional array from `index` on; a vector if more than one."""
    data = context.make_array(array_type)(context, builder, array).data
    pointer = builder.gep(data, [index])
    return pointer if lanes == 1 else builder.bitcast(pointer, ir.VectorType(pointer.type.pointee, lanes).as_pointer())


def _step(builder, start, stride, count: int):
    return builder.add(start, builder.mul(stride, stride.type(count)))


def _splat(builder, value, lanes: int):
    none = ir.Constant(ir.VectorType(value.type, lanes), ir.Undefined)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
    return builder.shuffle_vector(builder.insert_element(none, value, ir.IntType(32)(0)), none, zeros)


def _constant(element, value, lanes: int):
    return ir.Constant(ir.VectorType(element, lanes), [value] * lanes)


def _sum_of(lanes: int) -> Any:
    """dst[d : d + lanes] = sum, t rising to n, of weights[w + t] * src[s + t * stride : ... + lanes]; src uint8 or float32."""

    @intrinsic
    def sum_taps(typingctx, dst, d, src, s, stride, weights, w, n):
        def codegen(context, builder, signature, args):
            dst_v, d_v, src_v, s_v, stride_v, weights_v, w_v, n_v = args
            vector = ir.VectorType(ir.FloatType(), lanes)
            total = cgutils.alloca_once(builder, vector)  # LLVM keeps it in registers
            builder.store(_constant(ir.FloatType(), 0.0, lanes), total)
            with cgutils.for_range(builder, n_v) as loop:
                index = builder.add(s_v, builder.mul(loop.index, stride_v))
                x = builder.load(_pointer(context, builder, src, src_v, index, lanes), align=1)
                if src.dtype == types.uint8:
                    x = builder.uitofp(x, vector)
                weight = builder.load(_pointer(context, builder, weights, weights_v, builder.add(w_v, loop.index), 1))
                part = builder.fmul(x, _splat(builder, weight, lanes))
                builder.store(builder.fadd(builder.load(total), part), total)
            builder.store(builder.load(total), _pointer(context, builder, dst, dst_v, d_v, lanes), align=1)
            return context.get_dummy_value()

        return types.void(dst, types.intp, src, types.intp, types.intp, weights, types.intp, types.intp), codegen

    return sum_taps


_sum_lanes, _sum_wide = _sum_of(LANES), _sum_of(WIDE)


_intrinsic: Any = intrinsic  # whose functions take one argument less than they say


@_intrinsic
def _transpose(typingctx, dst, d, dst_stride, src, s, src_stride):
    """Eight rows of eight float32 from src[s] on to eight columns from dst[d] on; rows of dst are written from first to last."""

    def codegen(context, builder, signature, args):
        dst_v, d_v, dst_stride_v, src_v, s_v, src_stride_v = args
        rows = []
        for i in range(BLOCK):
            pointer = _pointer(context, builder, src, src_v, _step(builder, s_v, src_stride_v, i), BLOCK)
            rows.append(builder.load(pointer, align=1))
        # A perfect shuffle of the rows, three times: bits of the row's number move into that of the column.
        mask = ir.VectorType(ir.IntType(32), BLOCK)
        low = ir.Constant(mask, [k // 2 + k % 2 * BLOCK for k in range(BLOCK)])
        high = ir.Constant(mask, [(k + BLOCK) // 2 + k % 2 * BLOCK for k in range(BLOCK)])
        half = BLOCK // 2
        for _ in range(BLOCK.bit_length() - 1):
            rows = [builder.shuffle_vector(rows[i], rows[i + half], part) for i in range(half) for part in (low, high)]
        for i, row in enumerate(rows):
            pointer = _pointer(context, builder, dst, dst_v, _step(builder, d_v, dst_stride_v, i), BLOCK)
            builder.store(row, pointer, align=1)
        return context.get_dummy_value()

    return types.void(dst, types.intp, types.intp, src, types.intp, types.intp), codegen


def _paint_of(channels: int) -> Any:
    """Colours of row[x : x + LANES] of each channel (`size` apart) to bytes at dst[d], `plane` apart: shift + A x, clipped to
    .5 to 255.5, cut to whole numbers, then solarised; matrix float32 [C * C], shift with the half that rounds in it."""

    @intrinsic
    def paint(typingctx, dst, d, plane, row, x, size, matrix, shift, solarize):
        def codegen(context, builder, signature, args):
            dst_v, d_v, plane_v, row_v, x_v, size_v, matrix_v, shift_v, solarize_v = args
            f32, i8 = ir.FloatType(), ir.IntType(8)
            low, high = _constant(f32, 0.5, LANES), _constant(f32, 255.5, LANES)
            turn = builder.sub(i8(0), context.cast(builder, solarize_v, types.boolean, types.int8))  # all bits or none
            turn = _splat(builder, turn, LANES)
            pointers = (_pointer(context, builder, row, row_v, _step(builder, x_v, size_v, c), LANES) for c in range(channels))
            colours = [builder.load(pointer, align=1) for pointer in pointers]
            for c in range(channels):
                total = _splat(builder, shift_v, LANES)
                for k, colour in enumerate(colours):
                    at = _pointer(context, builder, matrix, matrix_v, plane_v.type(c * channels + k), 1)
                    total = builder.fadd(total, builder.fmul(colour, _splat(builder, builder.load(at), LANES)))
                total = builder.select(builder.fcmp_ordered(">", total, low), total, low)
                total = builder.select(builder.fcmp_ordered("<", total, high), total, high)
                value = builder.fptosi(total, ir.VectorType(ir.IntType(32), LANES))
                value = builder.trunc(value, ir.VectorType(i8, LANES))
                # 255 - value is value with all bits turned, and the highest bit says whether it is 128 or more.
                value = builder.xor(value, builder.and_(turn, builder.ashr(value, _constant(i8, 7, LANES))))
                pointer = _pointer(context, builder, dst, dst_v, _step(builder, d_v, plane_v, c), LANES)
                builder.store(value, pointer, align=1)
            return context.get_dummy_value()

        arguments = (dst, types.intp, types.intp, row, types.intp, types.intp, matrix, types.float32, types.boolean)
        return types.void(*arguments), codegen

    return paint


_paint_grey, _paint_colour = _paint_of(1), _paint_of(3)


def _copy_of(bits: int) -> Any:
    """dst[d : d + bits / 8] = the bytes at an address."""

    @intrinsic
    def copy(typingctx, dst, d, address):
        def codegen(context, builder, signature, args):
            dst_v, d_v, address_v = args
            word = ir.IntType(bits).as_pointer()
            pointer = builder.bitcast(_pointer(context, builder, dst, dst_v, d_v, 1), word)
            builder.store(builder.load(builder.inttoptr(address_v, word), align=1), pointer, align=1)
            return context.get_dummy_value()

        return types.void(dst, types.intp, types.intp), codegen

    return copy


_copy_byte, _copy_word = _copy_of(8), _copy_of(32)


@inner
def _sum_row(dst, d, src, s, stride, weights, w, n, length):
    """_sum_of for `length` elements; up to LANES - 1 more are written, which whoever writes the next row overwrites."""
    i = 0
    while i + WIDE <= length:
        _sum_wide(dst, d + i, src, s + i, stride, weights, w, n)
        i += WIDE
    while i < length:
        _sum_lanes(dst, d + i, src, s + i, stride, weights, w, n)
        i += LANES


# --- weights --------------------------------------------------------------------------------------------------------------


@inner
def _exp_of_negative(x):
    """exp(x), x <= 0, from sums and products, so that it is the same on every machine; 0 below exp(-60)."""
    if x < -60:
        return 0.0
    x /= 512.0
    power = 1.0
    for k in range(8, 0, -1):  # the series to x**8 / 8!, whose rest is below 1e-14
        power = 1.0 + power * x / k
    for _ in range(9):
        power *= power
    return power


@inner
def _cos_sin(turns):
    """Of -1/2 to 1/2 turns, likewise."""
    x = 2 * math.pi * turns / 8
    cos, sin = 1.0, 1.0
    for k in range(14, 0, -2):  # |x| <= .4: the rests are below 1e-17
        cos = 1.0 - cos * x * x / (k * (k - 1))
        sin = 1.0 - sin * x * x / (k * (k + 1))
    sin *= x
    for _ in range(3):
        cos, sin = cos * cos - sin * sin, 2 * sin * cos
    return cos, sin


class Taps(NamedTuple):
    """Where each of `size` pixels of a view comes from, along one axis."""

    first: np.ndarray
    """int64 [size]: its first source pixel."""
    number: np.ndarray
    """int64 [size]: how many it has."""
    weights: np.ndarray
    """float32 [size * most]."""
    most: int


@inner
def _empty_taps(size, most):
    return Taps(np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size * most, np.float32), most)


@inner
def _resize_taps(taps, raw, crop, size, flip):
    """As linear.resize_taps, but for the last bit; raw float64 [most] is overwritten."""
    first, number, weights, most = taps.first, taps.number, taps.weights, taps.most
    scale = crop / size
    support = max(scale, 1.0)
    slope = 1 / support
    for i in range(size):
        centre = (i + 0.5) * scale
        start = int(max(math.floor(centre - support + 0.5), 0.0))
        stop = int(min(math.floor(centre + support + 0.5), float(crop)))
        total = 0.0
        for t in range(stop - start):
            raw[t] = max(1 - abs(start + t + 0.5 - centre) * slope, 0.0)
            total += raw[t]
        total = 1 / total
        at = size - 1 - i if flip else i
        first[at], number[at] = start, stop - start
        for t in range(stop - start):
            weights[at * most + t] = raw[t] * total


@inner
def _blur_taps(weights, sigma, half):
    """The Gaussian of linear.blur_kernel in weights float32 [2 r + 1], r <= half: ends that weigh nothing are left out."""
    whole = 1.0
    for i in range(1, half + 1):
        whole += 2 * _exp_of_negative(-0.5 * (i / sigma) * (i / sigma))
    radius, left_out = half, 0.0
    while radius > 1:
        left_out += 2 * _exp_of_negative(-0.5 * (radius / sigma) * (radius / sigma))
        if left_out > TAIL * whole:
            break
        radius -= 1
    total = 1.0
    for i in range(1, radius + 1):
        total += 2 * _exp_of_negative(-0.5 * (i / sigma) * (i / sigma))
    for i in range(radius + 1):
        weight = _exp_of_negative(-0.5 * (i / sigma) * (i / sigma)) / total
        weights[radius - i] = weight
        weights[radius + i] = weight
    return radius


@inner
def _colour_matrix(matrix, factors, gray, maps):
    """linear.colour_maps' A in matrix float32 [C * C], from maps float64 [27]: to grey, chroma, chroma turned by a quarter."""
    gain = factors[BRIGHTNESS] * factors[CONTRAST]
    if len(maps) == 0:
        matrix[0] = gain
        return
    cos, sin = _cos_sin(factors[HUE])
    saturation = 0.0 if gray else factors[SATURATION]
    for i in range(9):
        matrix[i] = gain * (maps[i] + saturation * (cos * maps[9 + i] + sin * maps[18 + i]))


# --- pixels ---------------------------------------------------------------------------------------------------------------


class Scratch(NamedTuple):
    """Memory for one view after the other. L = C * size is the length of a row of all channels."""

    turned: np.ndarray
    """uint8 [W][H * C + LANES]: the part of the image that its crops touch, column by column."""
    strip: np.ndarray
    """float32 [BLOCK][rows * C, rounded up]: columns of the view, rows of the source."""
    across: np.ndarray
    """float32 [rows][L]: the crop, resized across."""
    blurred: np.ndarray
    """float32 [half + size + half][L]: the resized crop, blurred across, its borders mirrored."""
    line: np.ndarray
    """float32 [L]."""
    mirrored: np.ndarray
    """float32 [half + size + half]: a row of one channel."""
    totals: np.ndarray
    """float64 [rows]."""
    weights: np.ndarray
    """float32 [rows]: totals, and float32 [2 half + 1] of the blur."""
    matrix: np.ndarray
    """float32 [9]."""
    few: np.ndarray
    """uint8 [3 * LANES]: a row of views that are narrower than a vector."""


@inner
def _scratch(boxes, size, channels, half):
    turned, rows = 0, 1
    for b in range(len(boxes)):
        y0, y1, x0, x1 = _touched(boxes[b])
        turned = max(turned, (x1 - x0) * ((y1 - y0) * channels + LANES))
        for v in range(boxes.shape[1]):
            rows = max(rows, boxes[b, v, HEIGHT])
    length = channels * size
    return Scratch(
        np.empty(turned + LANES, np.uint8),
        np.empty(BLOCK * (rows * channels + LANES) + LANES, np.float32),
        np.empty((rows * channels + LANES) * size + LANES, np.float32),
        np.empty((size + 2 * half) * length + LANES, np.float32),
        np.empty(length + LANES, np.float32),
        np.empty(size + 2 * half + 2 * LANES, np.float32),
        np.empty(rows, np.float64),
        np.empty(max(rows, 2 * half + 1), np.float32),
        np.empty(9, np.float32),
        np.empty(3 * LANES, np.uint8),
    )


@inner
def _touched(boxes):
    """The smallest box around the crops of an image, boxes [m, 4]: y0, y1, x0, x1."""
    y0, y1, x0, x1 = boxes[0, TOP], 0, boxes[0, LEFT], 0
    for v in range(len(boxes)):
        y0, x0 = min(y0, boxes[v, TOP]), min(x0, boxes[v, LEFT])
        y1 = max(y1, boxes[v, TOP] + boxes[v, HEIGHT])
        x1 = max(x1, boxes[v, LEFT] + boxes[v, WIDTH])
    return y0, y1, x0, x1


@inner
def _turn(turned, address, strides, channels, y0, y1, x0, x1):
    """The image at `address`, strides of [C, H, W] in bytes, from rows to columns."""
    of_channel, of_row, of_pixel = strides[0], strides[1], strides[2]
    column = (y1 - y0) * channels + LANES
    # Of interleaved colours four bytes go at a time, the last of which is overwritten; not at the end, where it may not be read.
    fast = y1 - 1 if channels == 3 and of_channel == 1 and of_row >= 3 else y0
    for begin in range(x0, x1, 16):  # columns few enough that their ends stay in the cache
        end = min(begin + 16, x1)
        for y in range(y0, fast):
            d, source = (begin - x0) * column + (y - y0) * 3, address + y * of_row + begin * of_pixel
            for _ in range(begin, end):
                _copy_word(turned, d, source)
                d, source = d + column, source + of_pixel
        for y in range(fast, y1):
            for c in range(channels):
                d, source = (
                    (begin - x0) * column + (y - y0) * channels + c,
                    address + y * of_row + begin * of_pixel + c * of_channel,
                )
                for _ in range(begin, end):
                    _copy_byte(turned, d, source)
                    d, source = d + column, source + of_pixel


# Arrays are taken out of their tuples once a view: numba counts references each time, which costs as much as a row.


@inner
def _resize_across(scratch, start, column, rows, size, taps):
    """scratch.across [rows][size] from the columns of scratch.turned; rows counts those of every channel."""
    turned, strip, across = scratch.turned, scratch.strip, scratch.across
    first, number, weights, most = taps.first, taps.number, taps.weights, taps.most
    padded = (rows + LANES - 1) // LANES * LANES
    for begin in range(0, size, BLOCK):
        x0 = max(0, min(begin, size - BLOCK))  # the last strip may overlap the one before
        for i in range(min(BLOCK, size)):
            x = x0 + i
            _sum_row(strip, i * padded, turned, start + first[x] * column, column, weights, x * most, number[x], rows)
        # What a strip wider than the view writes beyond a row, the next row overwrites.
        for j in range(0, rows, BLOCK):
            _transpose(across, j * size + x0, size, strip, j, padded)


@inner
def _mean_luma(scratch, taps, rows, size, luma):
    """Of the resized crop, from the crop resized across: each of its rows counts as often as the view's rows use it."""
    line, totals, rounded = scratch.line, scratch.totals, scratch.weights
    first, number, weights, most = taps.first, taps.number, taps.weights, taps.most
    for y in range(rows):
        totals[y] = 0.0
    for y in range(size):
        for t in range(number[y]):
            totals[first[y] + t] += weights[y * most + t]
    for y in range(rows):
        rounded[y] = totals[y]
    length = len(luma) * size
    _sum_row(line, 0, scratch.across, 0, length, rounded, 0, rows, length)
    mean = 0.0
    for x in range(size):
        brightness = 0.0
        for c in range(len(luma)):
            brightness += luma[c] * line[c * size + x]
        mean += brightness
    return mean / (size * size)


@inner
def _blur_across(blurred, y, line, mirrored, weights, radius, size, channels):
    """Row radius + y of blurred from line."""
    for c in range(channels):
        for x in range(size):
            mirrored[radius + x] = line[c * size + x]
        for k in range(1, radius + 1):
            mirrored[radius - k] = mirrored[radius + k]
            mirrored[radius + size - 1 + k] = mirrored[radius + size - 1 - k]
        row = ((radius + y) * channels + c) * size
        _sum_row(blurred, row, mirrored, 0, 1, weights, 0, 2 * radius + 1, size)


@inner
def _mirror_rows(blurred, radius, size, length):
    last = radius + size - 1
    for k in range(1, radius + 1):
        for i in range(length):
            blurred[(radius - k) * length + i] = blurred[(radius + k) * length + i]
            blurred[(last + k) * length + i] = blurred[(last - k) * length + i]


@inner
def _paint(views, at, line, few, size, channels, matrix, shift, solarize):
    """A row of a view at views[at]."""
    plane = size * size
    if size < LANES:  # all of a vector is written, and would reach into other rows
        if channels == 3:
            _paint_colour(few, 0, LANES, line, 0, size, matrix, shift, solarize)
        else:
            _paint_grey(few, 0, LANES, line, 0, size, matrix, shift, solarize)
        for c in range(channels):
            for x in range(size):
                views[at + c * plane + x] = few[c * LANES + x]
        return
    for begin in range(0, size, LANES):
        x = min(begin, size - LANES)
        if channels == 3:
            _paint_colour(views, at + x, plane, line, x, size, matrix, shift, solarize)
        else:
            _paint_grey(views, at + x, plane, line, x, size, matrix, shift, solarize)


@inner
def _view(views, base, scratch, taps, sigma, shift, solarize, size, channels, half):
    """One view, at views[base], from the crop resized across and the colours in scratch.matrix."""
    line, few, across, blurred, matrix = scratch.line, scratch.few, scratch.across, scratch.blurred, scratch.matrix
    mirrored, gaussian = scratch.mirrored, scratch.weights
    first, number, weights, most = taps.first, taps.number, taps.weights, taps.most
    length = channels * size
    if sigma > 0:
        radius = _blur_taps(gaussian, sigma, half)
        for y in range(size):
            _sum_row(line, 0, across, first[y] * length, length, weights, y * most, number[y], length)
            _blur_across(blurred, y, line, mirrored, gaussian, radius, size, channels)
        _mirror_rows(blurred, radius, size, length)
        for y in range(size):
            _sum_row(line, 0, blurred, y * length, length, gaussian, 0, 2 * radius + 1, length)
            _paint(views, base + y * size, line, few, size, channels, matrix, shift, solarize)
    else:
        for y in range(size):
            _sum_row(line, 0, across, first[y] * length, length, weights, y * most, number[y], length)
            _paint(views, base + y * size, line, few, size, channels, matrix, shift, solarize)


def _batch(addresses, strides, boxes, factors, flags, maps, luma, size, half, views):
    """Fills views uint8 [B * m * C * size * size].

    addresses int64 [B] of the first pixels, strides int64 [B, 3] in bytes of uint8 [C, H, W]; boxes int64 [B, m, 4] inside the
    images; factors float64 [B, m, 5]; flags bool [B, m, 3]; maps float64 [27], for one channel [0]; luma float64 [C]; half: the
    blur's largest radius, below size.
    """
    channels = len(luma)
    scratch = _scratch(boxes, size, channels, half)
    most = 0
    for box in boxes.reshape(-1, 4):
        most = max(most, 2 * (max(box[HEIGHT], box[WIDTH]) // size + 1) + 2)
    across, down, raw = _empty_taps(size, most), _empty_taps(size, most), np.empty(most, np.float64)
    for b in range(len(boxes)):
        y0, y1, x0, x1 = _touched(boxes[b])
        column = (y1 - y0) * channels + LANES
        _turn(scratch.turned, addresses[b], strides[b], channels, y0, y1, x0, x1)
        for v in range(boxes.shape[1]):
            box, flag = boxes[b, v], flags[b, v]
            _resize_taps(across, raw, box[WIDTH], size, flag[FLIP])
            _resize_taps(down, raw, box[HEIGHT], size, False)
            start = (box[LEFT] - x0) * column + (box[TOP] - y0) * channels
            _resize_across(scratch, start, column, box[HEIGHT] * channels, size, across)
            _colour_matrix(scratch.matrix, factors[b, v], flag[GRAY], maps)
            shift, contrast = 0.0, factors[b, v, CONTRAST]
            if contrast != 1:
                shift = factors[b, v, BRIGHTNESS] * (1 - contrast) * _mean_luma(scratch, down, box[HEIGHT], size, luma)
            base = (b * boxes.shape[1] + v) * channels * size * size
            sigma, solarize = factors[b, v, SIGMA], flag[SOLARIZE]
            _view(views, base, scratch, down, sigma, np.float32(shift + 0.5), solarize, size, channels, half)


_SIGNATURE = types.void(
    types.int64[::1],
    types.int64[:, ::1],
    types.int64[:, :, ::1],
    types.float64[:, :, ::1],
    types.boolean[:, :, ::1],
    types.float64[::1],
    types.float64[::1],
    types.int64,
    types.int64,
    types.uint8[::1],
)
load = loader(_batch, _SIGNATURE)
"""_batch as machine code: from the cache (a fraction of a second), else compiled (some seconds)."""
