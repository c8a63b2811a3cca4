"""Faults to plant, each of one line, that the tests must find: data for run.py. README.md says how to add one."""

from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Mutant(NamedTuple):
    """`old` stands once in all files that match `files`, wherever the text has moved among them; `new` replaces it."""

    name: str
    kind: str
    files: str  # globs from the root, separated by spaces
    old: str
    new: str
    tests: str  # the tests concerned: tests/**/test_<name>.py
    first: str  # pytest's -k for those that probably find it
    why: str


class Misplaced(ValueError):
    pass


def sources(tree, files):
    """Paths relative to the tree."""
    globs = files.split()
    found = {p.relative_to(tree) for g in globs for p in tree.glob(g) if p.suffix in (".py", ".cpp", ".h")}
    return sorted(found)


def place(mutant, tree=ROOT):
    """The one file that holds the text, relative to the tree, and what it says with the fault in it."""
    texts = {path: (tree / path).read_text(encoding="utf-8") for path in sources(tree, mutant.files)}
    holding = [path for path, text in texts.items() for _ in range(text.count(mutant.old))]
    if len(holding) != 1:
        where = ", ".join(map(str, holding)) or f"no file of {mutant.files}"
        raise Misplaced(f"{mutant.name}: its text must stand once, stands in {where}")
    return holding[0], texts[holding[0]].replace(mutant.old, mutant.new)


def chosen(patterns):
    """The mutants of these names or globs of names; all without any."""
    some = [m for m in MUTANTS if not patterns or any(fnmatch(m.name, p) for p in patterns)]
    if not some:
        raise SystemExit(f"no mutant is called {' or '.join(patterns)}")
    return some


CPU, COMMON, OPS, ALL = "csrc/cpu/*", "csrc/common/*", "fastreg/ops/**/*.py", "fastreg/**/*.py"

MUTANTS = [
    # affine_displacement
    Mutant(
        "affine_z_is_y", "axes", "csrc/cpu/affine_displacement.cpp",
        "if (nd == 3) start += m[0] * double(row.z);",
        "if (nd == 3) start += m[0] * double(row.y);",
        "affine_displacement", "reference", "a slice is displaced as a row is",
    ),
    Mutant(
        "affine_tail_at_the_start", "tail", CPU,
        "sums.add(rest, kBlock, whole);",
        "sums.add(rest, kBlock, 0);",
        "affine_displacement", "reference", "the end of a row, which no whole block holds, counts as its beginning",
    ),
    Mutant(
        "affine_sums_in_fp32", "accumulation", CPU,
        "alignas(64) double plain_[kSumLanes] = {};",
        "alignas(64) float plain_[kSumLanes] = {};",
        "affine_displacement warp", "reference or gradcheck", "sums of a gradient lose digits",
    ),
    Mutant(
        "affine_second_derivative_moves", "double backward", OPS,
        "return torch.ops.fastreg.affine_displacement(grad, ctx.shape, False)",
        "return torch.ops.fastreg.affine_displacement(grad, ctx.shape, True)",
        "affine_displacement", "gradcheck or double", "the derivative of a linear op subtracts the identity",
    ),
    # bending_energy
    Mutant(
        "bending_mixed_counts_once", "weight", CPU,
        "(j == k ? 1.0 : 2.0 / 16.0)",
        "(j == k ? 1.0 : 1.0 / 16.0)",
        "bending_energy", "reference", "a mixed derivative stands twice in the Hessian",
    ),
    Mutant(
        "bending_zx_weighs_as_zy", "spacing", CPU,
        "if (in_y) sum += w[zx] * central_at<V>(row + x, z);",
        "if (in_y) sum += w[zy] * central_at<V>(row + x, z);",
        "bending_energy", "reference or spacing", "the same but where the spacing of y and x differ",
    ),
    Mutant(
        "bending_two_voxels_have_faces", "border", COMMON,
        "return n < 3 || (p > 0 && p + 1 < n);",
        "return n < 2 || (p > 0 && p + 1 < n);",
        "bending_energy", "reference or axes", "an axis of two voxels leaves nothing of the other axes",
    ),
    # diffusion
    Mutant(
        "diffusion_spacing_upside_down", "spacing", "csrc/cpu/diffusion.cpp",
        "const double ratio = spacing[c] / spacing[k];",
        "const double ratio = spacing[k] / spacing[c];",
        "diffusion", "reference or spacing", "the same at one spacing for all axes",
    ),
    Mutant(
        "diffusion_first_slice_pulls_not", "border", CPU,
        "below = r.y + 1 < a.size[1], before = r.z > 0,",
        "below = r.y + 1 < a.size[1], before = r.z > 1,",
        "diffusion", "reference", "slice 1 forgets its difference to slice 0",
    ),
    Mutant(
        "diffusion_l1_slope_at_zero", "kink", COMMON,
        "return d > 0 ? one : d < 0 ? -one : V{};",
        "return d >= 0 ? one : d < 0 ? -one : V{};",
        "diffusion", "zero or flat or constant or abs", "equal neighbours push each other away",
    ),
    Mutant(
        "row_sums_lose_voxel_511", "block", CPU,
        "each_x<A>(x0, std::min(end, x0 + kBlock), [&](auto v, int64_t x) {",
        "each_x<A>(x0, std::min(end, x0 + kBlock - 1), [&](auto v, int64_t x) {",
        "diffusion total_variation bending_energy", "reference", "the last voxel of a block of sums; only rows of more than 511 have one",
    ),
    # total_variation
    Mutant(
        "tv_leaves_out_last_voxels", "reduction", CPU,
        "count *= double(isotropic && n > 1 ? n - 1 : n);",
        "count *= double(n > 1 ? n - 1 : n);",
        "total_variation", "reference", "the anisotropic mean is over all voxels",
    ),
    Mutant(
        "tv_root_of_the_wrong_voxel", "border", CPU,
        "if (own && left) sum -= weight[2] * towards(-1) * load_as<V>(here.data() + x - 1);",
        "if (own && left) sum -= weight[2] * towards(-1) * load_as<V>(here.data() + x);",
        "total_variation", "reference", "the difference to the left belongs to the left voxel's root",
    ),
    Mutant(
        "tv_row_above_of_another_thread", "threads", CPU,
        "if (has_above && index == begin) reciprocals(above, index - 1);",
        "if (has_above && index == 0) reciprocals(above, index - 1);",
        "total_variation", "thread or deterministic", "a thread that begins within a plane has not seen the row above; one thread never does",
    ),
    # jacobian_determinant
    Mutant(
        "jacobian_cofactor_of_2d", "cofactor", CPU,
        "out[1 - k] = -a[k];",
        "out[1 - k] = a[k];",
        "jacobian_determinant", "reference", "sign of the off-diagonal cofactor",
    ),
    Mutant(
        "jacobian_last_voxel_is_central", "border", CPU,
        "if (n > 1) body(A(), n - 1, step_at(n - 1, n, 1));",
        "if (n > 1) body(A(), n - 1, Step{-1, 0, 0.5});",
        "jacobian_determinant", "reference", "the difference at a face is over one voxel, not two",
    ),
    Mutant(
        "jacobian_flat_axis_is_read", "nan", CPU,
        "const bool flat = s.low == s.high;",
        "const bool flat = false;",
        "jacobian_determinant", "finite or nan or voxel", "what is not finite less itself is not 0",
    ),
    Mutant(
        "jacobian_fake_keeps_halves", "fake", OPS,
        "return u.new_empty((u.shape[0], 1, *u.shape[2:]), dtype=_ext.arithmetic(u))",
        "return u.new_empty((u.shape[0], 1, *u.shape[2:]))",
        "jacobian_determinant", "opcheck", "under torch.compile the result has another dtype than it says",
    ),
    # gaussian_displacement
    Mutant(
        "gaussian_turns_back", "sign", COMMON,
        "grad[4] = sums.e0e1 * (g.sigma[0] / g.sigma[1] - g.sigma[1] / g.sigma[0]);",
        "grad[4] = sums.e0e1 * (g.sigma[1] / g.sigma[0] - g.sigma[0] / g.sigma[1]);",
        "gaussian_displacement", "reference", "gradient of the angle",
    ),
    Mutant(
        "gaussian_variance_is_a_deviation", "option", COMMON,
        "grad[2 + i] = sums.ee[i] / (variance ? 2 * g.sigma[i] * g.sigma[i] : g.sigma[i]);",
        "grad[2 + i] = sums.ee[i] / (variance ? g.sigma[i] * g.sigma[i] : g.sigma[i]);",
        "gaussian_displacement", "reference", "the option no example uses",
    ),
    Mutant(
        "gaussian_batch_reads_sample_0", "batch", CPU,
        "const Exponent<A> weight(g, gaussian_row(g, row, a.w));",
        "const Exponent<A> weight(g, gaussian_row(a.gaussians[t], row, a.w));",
        "gaussian_displacement", "reference", "the rows of a later sample follow the first's Gaussians",
    ),
    Mutant(
        "gaussian_wide_rows_keep_their_end", "block", CPU,
        "weight_y += lane_sum<A>(sum_y), weight_x += lane_sum<A>(sum_x);",
        "weight_y += lane_sum<A>(sum_y), weight_x = lane_sum<A>(sum_x);",
        "gaussian_displacement", "reference", "of rows beyond 512 columns the last block alone counts for vx",
    ),
    # integrate_gradients
    Mutant(
        "sums_last_row_is_left_out", "tail", CPU,
        "rows(a.outer - row);",
        "rows(a.outer - row - 1);",
        "integrate_gradients", "reference", "rows come in groups of eight; the last of the rest",
    ),
    Mutant(
        "sums_batch_stride", "batch", CPU,
        "                     nd * voxels,\n                     minus_one,",
        "                     voxels,\n                     minus_one,",
        "integrate_gradients", "reference", "sample 1 begins at component 1 of sample 0",
    ),
    Mutant(
        "sums_in_fp32", "accumulation", CPU,
        "alignas(64) double sums[kSumsBlock];",
        "alignas(64) A sums[kSumsBlock];",
        "integrate_gradients", "digits", "rounded once a voxel, not once a line",
    ),
    Mutant(
        "sums_reverse_of_reverse", "double backward", OPS,
        "lambda ctx, grad: (torch.ops.fastreg.integrate_gradients_bwd(grad, not ctx.reverse), None),",
        "lambda ctx, grad: (torch.ops.fastreg.integrate_gradients_bwd(grad, ctx.reverse), None),",
        "integrate_gradients", "gradcheck", "the transpose of the transpose",
    ),
    # integrate_velocity
    Mutant(
        "integrate_scales_the_gradient_twice", "scale", CPU,
        "run.pack(g[n], 1, flow);",
        "run.scaled(g[n], flow);",
        "integrate_velocity", "reference", "2^-steps belongs to the velocity alone",
    ),
    Mutant(
        "integrate_keeps_sample_0", "stale", CPU,
        "u[s] = fields[n][s - 1];",
        "u[s] = fields[0][s - 1];",
        "integrate_velocity", "reference", "the backward of a later sample walks the first's fields",
    ),
    Mutant(
        "integrate_checkpoint_off_by_one", "recomputation", CPU,
        "for (int64_t s = first + 1; s < stop && !kept; ++s) advance(s);",
        "for (int64_t s = first + 1; s + 1 < stop && !kept; ++s) advance(s);",
        "integrate_velocity", "checkpoint", "the last field of a segment is not computed again",
    ),
    Mutant(
        "integrate_zero_weight_meets_nan", "nan", CPU,
        "for (int i = 0; i < count * w; ++i) all &= -int32_t(value[i] - value[i] == A(0));",
        "for (int i = 0; i < count * w; ++i) all &= -1;",
        "integrate_velocity", "finite or nan", "a corner of weight 0 passes its NaN on",
    ),
    # compose
    Mutant(
        "compose_keeps_the_narrow_dtype", "dtype", COMMON,
        "WarpInputs inputs(op, u.to(c10::promoteTypes(u.scalar_type(), v.scalar_type())), v, {}, \"linear\",",
        "WarpInputs inputs(op, u, v, {}, \"linear\",",
        "compose", "dtype", "the result has the wider of both dtypes",
    ),
    Mutant(
        "compose_adds_the_wrong_sample", "batch", CPU,
        "const A* __restrict u = static_cast<const A*>(a.displacement) + (out - static_cast<T*>(a.result));",
        "const A* __restrict u = static_cast<const A*>(a.displacement) + (out - static_cast<T*>(a.result)) % (a.c * n_out);",
        "compose", "reference", "every sample is displaced by the first",
    ),
    # warp
    Mutant(
        "warp_far_plane_pulls_back", "sign", CPU,
        "dy = lerp(dy, e1 - e0, fz);",
        "dy = lerp(dy, e0 - e1, fz);",
        "warp", "against_reference", "gradient along y in the far plane of a cell",
    ),
    Mutant(
        "warp_scatters_to_the_wrong_row", "weight", CPU,
        "share[corner + 2][i] = hi_y - hi_hi, share[corner + 3][i] = hi_hi;",
        "share[corner + 2][i] = hi_y - hi_hi, share[corner + 3][i] = lo_hi;",
        "warp", "against_reference", "share of one of eight corners",
    ),
    Mutant(
        "warp_slab_misses_its_rows", "border", CPU,
        "int64_t hi = start + int64_t(std::floor(std::min(high, cap))) + 2;",
        "int64_t hi = start + int64_t(std::floor(std::min(high, cap)));",
        "warp integrate_velocity", "against_reference or threads", "rows that reach into the next slab of planes are not visited there",
    ),
    Mutant(
        "warp_slab_adds_to_its_neighbour", "border", "csrc/cpu/warp.cpp",
        "all &= plain[i];",
        "all &= p.inside[i];",
        "warp", "together or repeats", "a block all inside the image is taken for one all inside the slab",
    ),
    Mutant(
        "warp_rows_of_nobody", "border", "csrc/cpu/warp.cpp",
        "const bool owned = positions && r >= first && r < last;",
        "const bool owned = positions && r >= first && r + 1 < last;",
        "warp", "against_reference or together", "the last row of a share sends nothing back",
    ),
    Mutant(
        "warp_affine_of_sample_0", "batch", CPU,
        "const double* m = a.affine + (row.n * ND + k) * (ND + 1);",
        "const double* m = a.affine + k * (ND + 1);",
        "warp", "affine_against_reference", "every sample is moved by the first matrix",
    ),
    Mutant(
        "warp_nearest_has_a_gradient", "option", COMMON,
        "positions((to_displacement || to_affine) && !in.nearest && !in.empty()) {",
        "positions((to_displacement || to_affine) && !in.empty()) {",
        "warp", "nearest", "rounded positions have no slope",
    ),
    Mutant(
        "warp_forgets_a_direction", "double backward", ALL,
        "torch.zeros_like(o) if d is None else d.to(o.dtype)",
        "torch.zeros_like(o)",
        "warp", "gradcheck", "double backward along nothing",
    ),
    # lcc_loss
    Mutant(
        "lcc_mask_weighs_all_alike", "mask", "csrc/cpu/lcc_box.cpp",
        "out[x] = mask[here + x] == A(0) ? A(0) : A(out[x] * mask[here + x]);",
        "out[x] = mask[here + x] == A(0) ? A(0) : A(out[x]);",
        "lcc_loss", "against_reference and masked", "the same where a mask holds only 0 and 1",
    ),
    Mutant(
        "lcc_chunks_share_no_reference", "chunk", "csrc/cpu/lcc_box.cpp",
        "line.to_reference[k] = line.shift[k] - reference[k];",
        "line.to_reference[k] = 0.0;",
        "lcc_loss", "against_reference", "gradients are relative to one level; only volumes of more than 32 planes have two",
    ),
    Mutant(
        "lcc_slabs_without_halo", "threads", CPU,
        "k == a.n_chunks ? D : std::max<int64_t>(D * k / a.n_chunks - r[0], 0);",
        "k == a.n_chunks ? D : D * k / a.n_chunks;",
        "lcc_loss", "across or threads", "gradients near the seam of two slabs; one thread has one slab",
    ),
    Mutant(
        "lcc_map_is_not_averaged", "reduction", "csrc/cpu/lcc_box.cpp",
        "const double scale = a.upstream ? -1.0 / double(a.c) : -1.0;",
        "const double scale = -1.0;",
        "lcc_loss", "against_reference", "gradient of the map of several channels",
    ),
    Mutant(
        "lcc_window_edge_counts_twice", "border", CPU,
        "return t.tail[std::min(i + 1, t.length)] + t.tail[std::min(size - i, t.length)];",
        "return t.tail[std::min(i, t.length)] + t.tail[std::min(size - i, t.length)];",
        "lcc_loss", "against_reference", "weight of the padded samples of a weighted window",
    ),
    Mutant(
        "lcc_moved_takes_the_maps_of_fixed", "both gradients", CPU,
        "write(1, here, n, sum_of(a.n_adjoints - 2, i), sum_of(0, i), sum_of(a.n_adjoints - 1, i));",
        "write(1, here, n, sum_of(1, i), sum_of(0, i), sum_of(2, i));",
        "lcc_loss", "against_reference", "right where moved alone needs a gradient",
    ),
    Mutant(
        "lcc_last_rows_count_as_inner_ones", "border", CPU,
        "if (inside && inner_counts && !kMask) return true;",
        "if (inner_counts && !kMask) return true;",
        "lcc_loss", "segments", "weighted windows of rows near the far face, after some that are inside",
    ),
    Mutant(
        "lcc_mirror_slips", "order", CPU,
        "sample(kRows - 1 + k, high[(kRows - 1 + kPhase) % kRows]);",
        "sample(kRows - 2 + k, high[(kRows - 1 + kPhase) % kRows]);",
        "lcc_loss", "against_reference", "the samples of one side of a weighted window, one voxel off",
    ),
    # local_correlation
    Mutant(
        "correlation_border_one_short", "border", CPU,
        "return a.border && i == (upper ? a.size[axis] - 1 : 0) ? a.radius[axis] : 0;",
        "return a.border && i == (upper ? a.size[axis] - 1 : 0) ? a.radius[axis] - 1 : 0;",
        "local_correlation", "reference", "what the farthest voxels beyond a face would receive",
    ),
    Mutant(
        "correlation_deviation_of_a_population", "normaliser", COMMON,
        "-products / (2 * unit * (count - 1) * deviation)",
        "-products / (2 * unit * count * deviation)",
        "local_correlation", "reference and normal", "the deviation is unbiased; its derivative too",
    ),
    Mutant(
        "correlation_ring_of_another_sample", "stale", CPU,
        "if (n != n_ || y0 != y0_ || first < first_ || first > end_) end_ = first;",
        "if (y0 != y0_ || first < first_ || first > end_) end_ = first;",
        "local_correlation", "reference", "a plane kept from the sample before; in 3D its planes were others",
    ),
    Mutant(
        "correlation_moves_by_need_of_moving", "needs", OPS,
        "        need_moving or need_u,\n    )",
        "        need_moving,\n    )",
        "local_correlation", "needs or only or displacement", "a gradient to the displacement alone",
    ),
    Mutant(
        "correlation_of_seven_offsets", "tail", CPU,
        "return f.template operator()<2>(k);",
        "return f.template operator()<1>(k);",
        "local_correlation", "reference", "offsets come in groups of five; radius 3 leaves two",
    ),
    # mind, mind_loss
    Mutant(
        "mind_ties_take_all", "ties", COMMON,
        "const V to_least = -(six ? sum : sum + to_variance) * share;",
        "const V to_least = -(six ? sum : sum + to_variance);",
        "mind mind_loss", "tie or constant or reference", "channels that are least together share what returns",
    ),
    Mutant(
        "mind_border_column", "border", CPU,
        "std::fill_n(in + right(), width - right(), in[right() - 1]);",
        "std::fill_n(in + right(), width - right(), in[right() - 2]);",
        "mind mind_loss", "reference", "squares outside repeat those of the last voxel",
    ),
    Mutant(
        "mind_field_spoils_the_other_channel", "border", CPU,
        "int64_t) { p[j] = outside[i++]; });",
        "int64_t) { outside[i++] = p[j]; });",
        "mind mind_loss", "inside", "the second channel of a field finds the columns that the first repeated",
    ),
    Mutant(
        "mind_field_adjoints_forget_the_other_channel", "border", CPU,
        "p[border] += p[j], p[j] = outside[i++];",
        "p[border] += p[j], p[j] = A(0);",
        "mind mind_loss", "inside", "columns outside for one channel are inside for the other",
    ),
    Mutant(
        "mind_fields_at_the_border", "border", CPU,
        "t.begin[i] + t.size[i] + r[i] <= a.size[i];",
        "t.begin[i] + t.size[i] <= a.size[i];",
        "mind mind_loss", "reference or inside", "patches of the last tile repeat the border, of each channel its own",
    ),
    Mutant(
        "mind_l1_ignores_the_mask", "mask", COMMON,
        "error += by * sign, g[k] = w * sign;",
        "error += by * sign, g[k] = sign;",
        "mind mind_loss", "loss", "gradient of absolute differences",
    ),
    Mutant(
        "mind_six_lifts_its_variance", "option", COMMON,
        "const V origin = six ? V{} : least;",
        "const V origin = least;",
        "mind mind_loss", "reference", "V of \"six\" is of D, not of D - min D",
    ),
    Mutant(
        "mind_prepared_image_is_the_callers", "stale", ALL,
        'self.register_buffer("fixed", fixed.detach().clone(), persistent=False)',
        'self.register_buffer("fixed", fixed.detach(), persistent=False)',
        "mind mind_loss nn", "prepare", "a buffer that is filled anew changes the loss's fixed image",
    ),
    Mutant(
        "mind_prepared_mean_in_half", "dtype", ALL,
        "self.variance = variance.to(self.fixed.device)",
        "self.variance = self.variance.to(self.fixed.device)",
        "mind mind_loss nn", "prepare or half", "half() rounds the mean of V, which overflows one",
    ),
    # mse_loss
    Mutant(
        "mse_tail_is_left_out", "tail", "csrc/cpu/mse_loss.cpp",
        "static_cast<double*>(a.result)[index] = lane_sum<A>(lanes) + rest;",
        "static_cast<double*>(a.result)[index] = lane_sum<A>(lanes);",
        "mse_loss", "reference", "voxels that fill no vector",
    ),
    Mutant(
        "mse_nan_weight_is_zero", "nan", COMMON,
        "return mask <= 0 ? V{} : mask * value;",
        "return mask > 0 ? mask * value : V{};",
        "mse_loss", "nan or finite or mask", "a NaN in the mask must not pass unseen",
    ),
    Mutant(
        "mse_loss_is_averaged_too", "reduction", CPU,
        "const A scale = A(2) / A(a.per_voxel ? a.c : 1);",
        "const A scale = A(2) / A(a.c);",
        "mse_loss", "reference", "the sum over channels is no mean",
    ),
    Mutant(
        "mse_moved_as_it_lies", "contiguous", COMMON,
        ": fixed(fixed_.contiguous()), moved(moved_.contiguous()) {",
        ": fixed(fixed_.contiguous()), moved(moved_) {",
        "mse_loss", "layout", "a transposed image is read in the order of its memory",
    ),
    Mutant(
        "mse_mixed_takes_the_first_dtype", "dtype", OPS,
        "dtype = torch.promote_types(fixed.dtype, moved.dtype)\n    fixed, moved = fixed.to(dtype), moved.to(dtype)",
        "dtype = fixed.dtype\n    fixed, moved = fixed.to(dtype), moved.to(dtype)",
        "mse_loss lcc_loss mind", "mixed or dtype", "an fp64 moved image is cut to fp16",
    ),
    # resize_displacement
    Mutant(
        "resize_transposes_the_near_weight", "weight", CPU,
        "m.weight.push_back(lower[k] == i ? 1.0 - fraction[k] : fraction[k]);",
        "m.weight.push_back(1.0 - fraction[k]);",
        "resize_displacement", "reference", "the far voxel of a sample gets the near one's share",
    ),
    Mutant(
        "resize_scales_as_corners", "option", COMMON,
        "if (!align_corners) return double(n_out) / double(n_in);",
        "",
        "resize_displacement", "reference", "factor of a component without align_corners",
    ),
    Mutant(
        "resize_fraction_zero_is_read", "nan", CPU,
        "const V far = u != 0 ? u * load_as<V>(far_.data() + x) : V{};",
        "const V far = u * load_as<V>(far_.data() + x);",
        "resize_displacement", "finite or nan", "a voxel of weight 0 along x passes its NaN on",
    ),
    # smooth
    Mutant(
        "smooth_pads_by_its_border", "padding", CPU,
        "const int64_t i = corner_index(o + k, n, padding);",
        "const int64_t i = corner_index(o + k, n, Padding::border);",
        "smooth", "reference", "every padding is \"border\"",
    ),
    Mutant(
        "smooth_groups_cross_the_border", "border", CPU,
        "return i >= m.plain_begin && i + kGroup <= m.plain_end &&",
        "return i >= m.plain_begin && i + kGroup <= m.plain_end + 1 &&",
        "smooth", "reference", "the last row of a group is cut at the border, and takes the taps of the others",
    ),
    Mutant(
        "smooth_reflection_has_a_margin", "border", CPU,
        "const int64_t margin = radius + (transposed && radius > 0 && padding == Padding::reflection);",
        "const int64_t margin = radius;",
        "smooth", "reference", "reflection reaches one voxel further in the transpose",
    ),
    Mutant(
        "bf16_rounds_ties_up", "rounding", CPU,
        "const Words rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;",
        "const Words rounded = (bits + 0x8000) >> 16;",
        "smooth resize_displacement", "dtype or bf16 or round", "vectors and the single voxels at a row's end round unlike",
    ),
    # bspline_displacement
    Mutant(
        "bspline_reads_a_weightless_point", "nan", CPU,
        ": first + order + (row % spacing != 0);",
        ": first + order + 1;",
        "bspline_displacement", "finite or nan", "a control point of weight 0 passes its NaN on",
    ),
    Mutant(
        "bspline_cubic_weights", "weight", COMMON,
        "weight[2] = (1 + 3 * f * (1 + f * g)) / 6, weight[3] = f * f * f / 6;",
        "weight[2] = (1 + 3 * f * (1 + f * g)) / 6, weight[3] = f * f * g / 6;",
        "bspline_displacement", "reference or definition", "the weights of a voxel no longer sum to 1",
    ),
    # what ops share
    Mutant(
        "vmap_folds_the_wrong_axis", "vmap", ALL,
        "arg = arg.unsqueeze(0).expand(size, *arg.shape) if dim is None else arg.movedim(dim, 0)",
        "arg = arg.unsqueeze(0).expand(size, *arg.shape) if dim is None else arg.movedim(0, dim)",
        "bspline_displacement warp", "vmap", "right for in_dims of 0 and 1",
    ),
    Mutant(
        "unit_gradients_ignore_upstream", "chain rule", ALL,
        "grads[i] = (unit * grad.view(-1, *[1] * (unit.dim() - 1))).to(ctx.dtypes[i])",
        "grads[i] = unit.to(ctx.dtypes[i])",
        "lcc_loss mind", "reference", "right for a loss that nothing scales",
    ),
    Mutant(
        "double_backward_of_a_loss_is_silent", "double backward", ALL,
        "if any(g is not None for g in grads_of_units):",
        "if any(g is None for g in ()):",
        "lcc_loss mind", "double_backward", "no derivative without a word",
    ),
    Mutant(
        "double_backward_of_an_op_is_silent", "double backward", ALL,
        "raise RuntimeError(f\"fastreg::{name.removesuffix('_bwd')}: double backward is not supported\")",
        "return None",
        "mse_loss jacobian_determinant diffusion", "double or twice", "no derivative without a word",
    ),
    Mutant(
        "vmap_hides_what_requires_grad", "vmap", ALL,
        "while torch._C._functorch.is_batchedtensor(t):",
        "while False:",
        "lcc_loss mind", "vmap", "a mapped input asks for no gradient",
    ),
    Mutant(
        "negative_weights_count", "mask", OPS,
        "weight = added(mask.clamp_min(0).flatten(), total.dtype) * image.shape[1]",
        "weight = added(mask.flatten(), total.dtype) * image.shape[1]",
        "mse_loss lcc_loss mind", "mask", "weights below 0 count as 0 in the sum and not in its divisor",
    ),
    Mutant(
        "masked_mean_of_one_channel", "reduction", OPS,
        "weight = added(mask.clamp_min(0).flatten(), total.dtype) * image.shape[1]",
        "weight = added(mask.clamp_min(0).flatten(), total.dtype)",
        "mse_loss lcc_loss mind", "mask or reference", "the mean is over channels too",
    ),
    Mutant(
        "fake_keeps_the_strides", "fake", "fastreg/_ext.py",
        "torch.empty_like(t, memory_format=torch.contiguous_format)\n        if need",
        "torch.empty_like(t)\n        if need",
        "mse_loss warp", "opcheck or compile or layout", "under torch.compile a gradient has strides that the kernel does not write",
    ),
    # metrics
    Mutant(
        "assd_swaps_the_spacing", "axes", ALL,
        "image.SetSpacing(scale[::-1])",
        "image.SetSpacing(scale)",
        "metrics", "assd or surface or hd95", "SimpleITK counts axes from x",
    ),
    Mutant(
        "folding_overlooks_nan", "nan", ALL,
        "return (~(determinant > 0)).double().mean().item()",
        "return (determinant <= 0).double().mean().item()",
        "metrics", "fold", "a NaN counts as folded",
    ),
    Mutant(
        "hd95_takes_the_nearer_side", "reduction", ALL,
        "lambda a, b: max(np.percentile(d, 95) for d in (a, b)),",
        "lambda a, b: min(np.percentile(d, 95) for d in (a, b)),",
        "metrics", "hd95", "right where both surfaces are alike far apart",
    ),
    # registration
    Mutant(
        "register_steps_by_inverse_spacing", "spacing", ALL,
        "scale = torch.tensor([finest / s for s in size], dtype=torch.float32, device=field.device)",
        "scale = torch.tensor([s / finest for s in size], dtype=torch.float32, device=field.device)",
        "registration", "anisotropic or affine_is_found", "the same at one spacing for all axes",
    ),
    Mutant(
        "register_smooths_fine_levels_wide", "order", ALL,
        "width = None if smoothing is None else smoothing * 2.0 ** (len(shapes) - 1 - number)",
        "width = None if smoothing is None else smoothing * 2.0**number",
        "registration", "units_are", "the finest level's smoothing is what was asked for",
    ),
    Mutant(
        "register_rescales_without_the_mask", "mask", ALL,
        "rescaled = (_descent.rescaled(fixed, mask),",
        "rescaled = (_descent.rescaled(fixed),",
        "registration", "mask_hides", "what the mask hides sets the range of intensities",
    ),
    Mutant(
        "register_velocity_forgets_the_affine", "composition", ALL,
        'u = torch.einsum("nij,nj...->ni...", affine[..., :-1], u)',
        "u = u + 0",
        "registration", "before_the_affine", "A (p + u(p)), not A p + u(p)",
    ),
    Mutant(
        "register_relaxes_without_the_affine", "composition", ALL,
        "bad = _fused.jacobian_determinant(u if shift is None else u + shift) < _LEAST_JACOBIAN",
        "bad = _fused.jacobian_determinant(u) < _LEAST_JACOBIAN",
        "registration", "before_the_affine or relax", "folds are those of the whole motion",
    ),
    Mutant(
        "register_composes_the_start_backwards", "composition", ALL,
        "linear = s[..., :-1] @ affine[..., :-1].to(s)",
        "linear = affine[..., :-1].to(s) @ s[..., :-1]",
        "start", "follows_a_start", "start(affine p), not affine(start p)",
    ),
    Mutant(
        "register_turns_no_displacement_by_the_start", "composition", ALL,
        'u = torch.einsum("ij,nj...->ni...", linear, u)',
        "u = u + 0",
        "start", "holds_the_start", "what was found after a start is turned by it",
    ),
    Mutant(
        "register_penalises_what_was_searched", "order", ALL,
        "added = field if self.exempt is None else field - self.exempt",
        "added = field",
        "discrete", "sliding_is_found", "what was found is exempt from the penalty",
    ),
    Mutant(
        "register_turns_no_searched_field", "composition", ALL,
        "return u if linear is None else",
        "return u if linear is None or True else",
        "discrete", "affine_part", "what was found after an affine part is turned by it",
    ),
    Mutant(
        "register_searches_what_the_moving_mask_hides", "mask", ALL,
        "share.clamp(max=1))",
        "0 * share)",
        "discrete", "masks", "what the moving mask hides costs as much as all else",
    ),
    Mutant(
        "register_searches_one_way", "order", ALL,
        "for one, two in ((a, b), (b, a))]",
        "for one, two in ((a, b), (a, b))]",
        "discrete", "sliding_is_found or affine_part", "the way back is searched in the other image",
    ),
    Mutant(
        "register_searches_from_the_corner_of_a_cell", "border", ALL,
        "large = F.interpolate(scaled, scale_factor=whole, mode=_LINEAR[nd], align_corners=False)",
        "large = F.interpolate(scaled, scale_factor=whole, mode=_LINEAR[nd], align_corners=True)",
        "discrete", "field_of_cells", "cells have their value at their middle",
    ),
    Mutant(
        "register_leaves_the_moving_mask_behind", "mask", ALL,
        "return warped(weights, u, affine)",
        "return weights",
        "registration_masks", "goes_along", "the weights of the moving image move with it",
    ),
    Mutant(
        "register_smooths_what_the_moving_mask_hides", "mask", ALL,
        "known = mask > 0 if moves else",
        "known = mask >= 0 if moves else",
        "registration_masks", "not_looked_at", "padding is filled before a level smooths it",
    ),
    Mutant(
        "register_is_rigid_in_voxels", "spacing", ALL,
        "return torch.cat([matrix[:, :-1] * s / s[:, None], matrix[:, -1:] / s[:, None]], 1)[None]",
        "return torch.cat([matrix[:, :-1], matrix[:, -1:] / s[:, None]], 1)[None]",
        "start registration", "rotation_in_mm or affine_is_found", "a rotation in mm is none in voxels that are no cubes",
    ),
    # training
    Mutant(
        "training_masks_by_the_first", "mask", ALL,
        "_one(prediction, k), mask[k : k + 1])",
        "_one(prediction, k), mask[:1])",
        "training", "masks_weigh", "every pair of a batch is weighed by the first's mask",
    ),
    Mutant(
        "training_resumes_without_its_patience", "stale", ALL,
        '"best": float, "stale": int, "waited": int,',
        '"best": float, "stale": int,',
        "training", "continues or patience", "a resumed training waits anew",
    ),
    Mutant(
        "training_watches_itself", "plateau", ALL,
        "value = self.epoch_sum / self.epoch_steps if self.validation is None else self._validated()",
        "value = self.epoch_sum / self.epoch_steps",
        "training run", "watch or patience", "the training loss decides though validation is watched",
    ),
    Mutant(
        "lindef_sums_beside_a_mean", "reduction", ALL,
        '"mean": (1, 1 / voxels)',
        '"mean": (1, 1)',
        "losses", "depend or deform", "the larger the image, the less Phi can move",
    ),
    Mutant(
        "training_draws_the_same_noise", "seed", ALL,
        "torch.manual_seed(((self.seed * 1_000_003 + self.step) * 1009 + self.rank) % 2**63)",
        "torch.manual_seed((self.seed * 1_000_003 * 1009 + self.rank) % 2**63)",
        "training", "continues", "what a model draws does not depend on the step",
    ),
    Mutant(
        "training_always_casts", "autocast", ALL,
        "with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):",
        "with torch.autocast(self.device.type, torch.bfloat16):",
        "training", "adams or weigh", "bf16 without being asked for",
    ),
]  # fmt: skip

# Those of an op may stand in a file of its own, mutants_<op>.py.
for _path in sorted(Path(__file__).parent.glob("mutants_*.py")):
    MUTANTS += import_module(_path.stem).mutants(Mutant)
