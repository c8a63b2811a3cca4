def mutants(Mutant):
    return [
        Mutant(
            "cost_far_border_is_the_near_one", "border", "csrc/cpu/cost_volume.cpp",
            "patch[x] = load(row[line - 1]);",
            "patch[x] = load(row[0]);",
            "cost_volume", "reference", "offsets beyond the last voxel read the first",
        ),
        Mutant(
            "cost_blocks_forget_the_stride", "tail", "csrc/common/cost_volume.h",
            "return {first + block * most * a.stride[k],",
            "return {first + block * most,",
            "cost_volume", "reference and blocks", "a long cell with a stride: its second block",
        ),
        Mutant(
            "cost_mask_is_zero_or_one", "mask", "csrc/cpu/cost_volume.cpp",
            "sum[r] += b.weight[s] * (d * d);",
            "sum[r] += d * d;",
            "cost_volume", "reference", "weights count, not only their sign",
        ),
        Mutant(
            "cost_no_weight_is_nan", "mask", "csrc/cpu/cost_volume.cpp",
            "const A total = weight == 0 ? A(1) : A(weight * double(a.c));",
            "const A total = A(weight * double(a.c));",
            "cost_volume", "weight or reference", "a cell that the mask leaves out decides nothing",
        ),
        Mutant(
            "cost_rest_of_a_row_is_lost", "tail", "csrc/cpu/cost_volume.cpp",
            "if (x == n) return;",
            "if (x == n || x > 0) return;",
            "cost_volume", "rows", "offsets beyond the last whole vector",
        ),
        Mutant(
            "cost_backward_stops_a_chunk_early", "gradient", "fastreg/ops/cost_volume.py",
            "for k in range(0, len(offsets), step):",
            "for k in range(0, len(offsets) - 1, step):",
            "cost_volume", "chunk or few", "the last offset has a gradient too",
        ),
        Mutant(
            "cost_gradient_beyond_the_end_is_lost", "border", "csrc/cpu/cost_volume.cpp",
            "row[0] += A(before), row[line - 1] += A(behind);",
            "row[0] += A(before);",
            "cost_volume", "reference", "the last voxel receives what was read beyond it",
        ),
        Mutant(
            "cost_gradient_of_moving_has_no_weight", "mask", "csrc/cpu/cost_volume.cpp",
            "before -= weight * t;",
            "before -= t;",
            "cost_volume", "reference", "the weight of the voxel of fixed, at moving",
        ),
        Mutant(
            "cost_gradient_of_unused_lanes", "nan", "csrc/cpu/cost_volume.cpp",
            "const V t = V(Bits(g * (value - m)) & keep);",
            "const V t = g * (value - m);",
            "cost_volume", "nan", "0 times a NaN that another offset reads",
        ),
        Mutant(
            "cost_gradient_skips_layers", "threads", "csrc/cpu/cost_volume.cpp",
            "unit % a.layers * a.apart,",
            "unit % a.layers,",
            "cost_volume", "reference or layers", "the layers of a pass are apart",
        ),
        Mutant(
            "cost_gradient_counts_all_voxels", "stride", "csrc/cpu/cost_volume.cpp",
            "x < last[2]; x += a.stride[2]) {",
            "x < last[2]; ++x) {",
            "cost_volume", "reference", "the mean is over the voxels that count",
        ),
        Mutant(
            "tree_motion_is_turned", "axes", "csrc/cpu/spanning_tree.cpp",
            "t[k] = a.previous[3 * from + k] - a.previous[3 * to + k];",
            "t[k] = a.previous[3 * to + k] - a.previous[3 * from + k];",
            "tree", "labellings", "what labels are added to, of the wrong cell",
        ),
        Mutant(
            "tree_hears_itself", "messages", "csrc/cpu/spanning_tree.cpp",
            "rest[l] = of_parent[l] - message[l];",
            "rest[l] = of_parent[l];",
            "tree", "labellings", "a cell hears back what it said",
        ),
        Mutant(
            "tree_hangs_by_its_end", "order", "csrc/cpu/spanning_tree.cpp",
            "for (int64_t k = 0; k < length / 2; ++k) root = p[root];",
            "for (int64_t k = 0; k < length / 4; ++k) root = p[root];",
            "tree", "tree_is or middle", "a deep tree has thin levels",
        ),
        Mutant(
            "tree_takes_a_nan", "nan", "fastreg/_tree.py",
            "not all(abs(float(v)) < _MOST",
            "not any(abs(float(v)) < _MOST",
            "tree", "errors", "a cost that is not a number would never be the least",
        ),
    ]  # fmt: skip
