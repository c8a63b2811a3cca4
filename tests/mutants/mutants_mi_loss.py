def mutants(Mutant):
    return [
        Mutant(
            "mi_margin_counts", "border", "csrc/common/mi_loss.h",
            "if (first + k < 0 || first + k >= bins) weight[k] = 0;",
            "if (first + k < 0) weight[k] = 0;",
            "mi_loss", "reference or definition", "bins that are not there take weight from the last",
        ),
        Mutant(
            "mi_outside_has_a_gradient", "border", "csrc/common/mi_loss.h",
            "return x < axis.low || x > axis.high ? 0 : axis.per_unit;",
            "return axis.per_unit;",
            "mi_loss", "clamped or reference", "a value out of range is moved for nothing",
        ),
        Mutant(
            "mi_slope_is_not_normalised", "gradient", "csrc/common/mi_loss.h",
            "slope[k] = 4 * weight[k] * (k - mean);",
            "slope[k] = 4 * weight[k] * k;",
            "mi_loss", "gradcheck or reference", "the sum of the weights moves too",
        ),
        Mutant(
            "mi_mask_is_zero_or_one", "mask", "csrc/cpu/mi_loss.cpp",
            "for (double& x : v) x *= weight;",
            "for (double& x : v) x *= 1;",
            "mi_loss", "reference", "weights count, not only their sign",
        ),
        Mutant(
            "mi_nan_is_skipped", "nan", "csrc/cpu/mi_loss.cpp",
            "sums[0] = std::numeric_limits<double>::quiet_NaN();",
            "sums[0] += 0;",
            "mi_loss", "nan", "a loss that looks well of an image that is not",
        ),
        Mutant(
            "mi_last_slab_is_cut", "tail", "csrc/cpu/mi_loss.cpp",
            "args.slab = (args.voxels + args.slabs - 1) / args.slabs;",
            "args.slab = args.voxels / args.slabs;",
            "mi_loss", "reference or slabs", "voxels that fill no slab",
        ),
        Mutant(
            "mi_range_of_what_is_masked_out", "mask", "fastreg/ops/mi_loss.py",
            "(torch.where(mask > 0, image, end) for",
            "(torch.where(mask > -1, image, end) for",
            "mi_loss", "reference or nan", "what is masked out decides on the bins",
        ),
    ]  # fmt: skip
