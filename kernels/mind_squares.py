"""Squared differences of MIND's samples, windowed along x, and the gradient of the image: their transpose."""

import triton
import triton.language as tl

# One kernel for the levels of a pyramid: what a launch would know of sizes is divisibility, of no use to one voxel a thread.
SIZES = ("D", "H", "W", "begin", "end")
# Codes of the samples that channels compare: 0 the voxel, 1 -z, 2 +z, 3 -y, 4 +y, 5 -x, 6 +x; three bits a channel.


@triton.jit
def place_of_program(planes, H, W, PLANES: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr):
    """Image, segment of PLANES planes and tile of a program, and the number of tiles: all along x, as a grid's y and z end at 65,535."""
    tiles = tl.cdiv(W, TX) * tl.cdiv(H, TY)
    segments = tl.cdiv(planes, PLANES)
    pid = tl.program_id(0)
    return (pid // tiles // segments).to(tl.int64), pid // tiles % segments, pid % tiles, tiles


@triton.jit
def voxels_of_tile(tile, first, last, H, W, TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr):
    """Planes (of first ... last - 1), rows and columns of the voxels of a tile, clamped, and which lie inside."""
    columns = (W + TX - 1) // TX
    v = tl.arange(0, TZ * TY * TX)
    z = first + v // (TY * TX)
    y = (tile // columns) * TY + v // TX % TY
    x = (tile % columns) * TX + v % TX
    inside = (z < last) & (y < H) & (x < W)
    return tl.minimum(z, last - 1), tl.minimum(y, H - 1), tl.minimum(x, W - 1), inside


@triton.jit
def _codes(CODES: tl.constexpr, K: tl.constexpr):
    k = tl.arange(0, K)[:, None]
    return ((CODES >> (3 * k.to(tl.int64))) & 7).to(tl.int32)


@triton.jit(do_not_specialize=[*SIZES, "slots"])
def squares_kernel(
    image, out, weights, C, D, H, W, step_z, step_y, step_x, slots, begin, end,
    FIRST: tl.constexpr, SECOND: tl.constexpr, USED: tl.constexpr, NC: tl.constexpr, RX: tl.constexpr,
    A: tl.constexpr, K: tl.constexpr, TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
):  # fmt: skip
    """Squared differences of the channels, windowed along x: planes of the image -> (N, slots, H, W / TX, NC, TX).

    A program is a tile of one plane; of TZ planes where these are small. Each sample is loaded once for all channels that compare it.
    """
    n, segment, tile, _ = place_of_program(end - begin, H, W, TZ, TY, TX)
    z, y, x, inside = voxels_of_tile(tile, begin + segment * TZ, end, H, W, TZ, TY, TX)
    first, second = _codes(FIRST, K), _codes(SECOND, K)
    row = tl.cast(W, tl.int64)
    plane = row * H
    # Rows of the samples along z and y; samples along x share the voxel's.
    here = z * plane + y * row
    z_down, z_up = (
        tl.maximum(z - step_z, 0) * plane + y * row,
        tl.minimum(z + step_z, D - 1) * plane + y * row,
    )
    y_down, y_up = (
        z * plane + tl.maximum(y - step_y, 0) * row,
        z * plane + tl.minimum(y + step_y, H - 1) * row,
    )
    windowed = tl.full((K, TZ * TY * TX), 0, A)
    for t in range(-RX, RX + 1):
        column = tl.minimum(tl.maximum(x + t, 0), W - 1)
        squares = tl.full((K, TZ * TY * TX), 0, A)
        for c in range(C):
            source = image + (n * C + c) * D * plane
            a = tl.full((K, TZ * TY * TX), 0, A)
            b = tl.full((K, TZ * TY * TX), 0, A)
            for s in tl.static_range(7):
                if (USED >> s) & 1:
                    if s == 0:
                        at = here + column
                    elif s == 1:
                        at = z_down + column
                    elif s == 2:
                        at = z_up + column
                    elif s == 3:
                        at = y_down + column
                    elif s == 4:
                        at = y_up + column
                    elif s == 5:
                        at = here + tl.maximum(column - step_x, 0)
                    else:
                        at = here + tl.minimum(column + step_x, W - 1)
                    sample = tl.load(source + at).to(A)[None, :]
                    a = tl.where(first == s, sample, a)
                    b = tl.where(second == s, sample, b)
            squares += (a - b) * (a - b)
        if RX == 0:
            windowed = squares
        else:
            windowed += tl.load(weights + (t + RX)) * squares
    k = tl.arange(0, K)[:, None]
    row_size = tl.cast((W + TX - 1) // TX * (NC * TX), tl.int64)
    at = ((n * slots + z % slots) * H + y) * row_size + x // TX * (NC * TX) + x % TX
    tl.store(out + at[None, :] + k * TX, windowed, mask=inside[None, :] & (k < NC))


@triton.jit(do_not_specialize=[*SIZES, "slots"])
def image_kernel(
    adjoint, image, grad, weights, C, D, H, W, step_z, step_y, step_x, slots, begin, end,
    FIRST: tl.constexpr, SECOND: tl.constexpr, NC: tl.constexpr, RX: tl.constexpr,
    A: tl.constexpr, K: tl.constexpr, TZ: tl.constexpr, TY: tl.constexpr, TX: tl.constexpr,
):  # fmt: skip
    """Gradient of the image from the adjoints of its squares, yet to be windowed along x, (N, slots, H, W / TX, NC, TX).

    A program is a tile as that of the squares, of one image channel. A voxel p gathers from the two voxels q of each MIND channel whose
    first or second sample it is, q = p - offset. A voxel at a face is also the sample of the voxels q nearer to that face than
    the offset is long: only tiles at faces take these steps.
    """
    nc, segment, tile, _ = place_of_program(end - begin, H, W, TZ, TY, TX)
    z, y, x, inside = voxels_of_tile(tile, begin + segment * TZ, end, H, W, TZ, TY, TX)
    n = nc // C
    k = tl.arange(0, K)[:, None]
    row = tl.cast(W, tl.int64)
    plane = row * H
    z, y, x = z[None, :], y[None, :], x[None, :]
    row_size = tl.cast((W + TX - 1) // TX * (NC * TX), tl.int64)
    image += nc * D * plane
    here = tl.load(image + z * plane + y * row + x).to(A)
    faces = tl.max(((z == 0) | (z == D - 1)).to(tl.int32) * step_z)
    faces = tl.maximum(faces, tl.max(((y == 0) | (y == H - 1)).to(tl.int32) * step_y))
    faces = tl.maximum(faces, tl.max(((x == 0) | (x == W - 1)).to(tl.int32) * step_x))
    total = tl.full((K, TZ * TY * TX), 0, A)
    for side in tl.static_range(2):
        mine = _codes(FIRST if side == 0 else SECOND, K)
        other = _codes(SECOND if side == 0 else FIRST, K)
        sz = (mine == 2).to(tl.int32) - (mine == 1).to(tl.int32)
        sy = (mine == 4).to(tl.int32) - (mine == 3).to(tl.int32)
        sx = (mine == 6).to(tl.int32) - (mine == 5).to(tl.int32)
        other_z = step_z * ((other == 2).to(tl.int32) - (other == 1).to(tl.int32))
        other_y = step_y * ((other == 4).to(tl.int32) - (other == 3).to(tl.int32))
        other_x = step_x * ((other == 6).to(tl.int32) - (other == 5).to(tl.int32))
        # How far, in steps m, p stands for the voxels beyond its face.
        reach = tl.where(((sz < 0) & (z == 0)) | ((sz > 0) & (z == D - 1)), step_z, 0)
        reach = tl.where(((sy < 0) & (y == 0)) | ((sy > 0) & (y == H - 1)), step_y, reach)
        reach = tl.where(((sx < 0) & (x == 0)) | ((sx > 0) & (x == W - 1)), step_x, reach)
        for m in range(0, faces + 1):
            qz, qy, qx = z - sz * (step_z - m), y - sy * (step_y - m), x - sx * (step_x - m)
            keep = (reach >= m) & (k < NC)
            keep = keep & (qz >= 0) & (qz < D) & (qy >= 0) & (qy < H) & (qx >= 0) & (qx < W)
            oz = tl.minimum(tl.maximum(qz + other_z, 0), D - 1)
            oy = tl.minimum(tl.maximum(qy + other_y, 0), H - 1)
            ox = tl.minimum(tl.maximum(qx + other_x, 0), W - 1)
            partner = tl.load(image + oz * plane + oy * row + ox, mask=keep, other=0).to(A)
            slot = tl.maximum(qz, 0) % slots
            source = adjoint + ((n * slots + slot) * H + qy) * row_size + k * TX
            g = tl.full((K, TZ * TY * TX), 0, A)
            for t in tl.range(-RX, RX + 1, loop_unroll_factor=2 * RX + 1 if RX <= 2 else 1):
                near = qx + t
                column = near // TX * (NC * TX) + near % TX
                sample = tl.load(source + column, mask=keep & (near >= 0) & (near < W), other=0)
                if RX > 0:
                    at_face = ((qx == 0) & (near >= qx)) | ((qx == W - 1) & (near <= qx))
                    tail = tl.load(weights + (2 * RX + 1 + tl.maximum(t, -t)))
                    sample *= tl.where(at_face, tail, tl.load(weights + (t + RX)))
                g += sample
            total += tl.where(keep, g * (here - partner), 0.0)
    result = 2.0 * tl.sum(total, 0)[None, :]
    tl.store(grad + (nc * D + z) * plane + y * row + x, result, mask=inside[None, :])
