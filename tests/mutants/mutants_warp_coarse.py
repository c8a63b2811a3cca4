def mutants(Mutant):
    return [
        Mutant(
            "coarse_next_along_y_is_along_x", "layout", "csrc/cpu/warp_coarse.cpp",
            "if (fy > 0) combine<false>(u + n, ",
            "if (fy > 0) combine<false>(u + 1, ",
            "warp_coarse", "reference", "the wrong neighbour, close in a smooth field",
        ),
        Mutant(
            "coarse_factor_of_another_axis", "2d", "csrc/cpu/warp_coarse.cpp",
            "const double factor = a.factor[k + 3 - ND];",
            "const double factor = a.factor[k];",
            "warp_coarse", "reference", "right in three dimensions",
        ),
        Mutant(
            "coarse_weight_zero_reads_a_nan", "nan", "csrc/cpu/warp_coarse.cpp",
            "if (w != A(0)) sum += w * line[first[i] + t];",
            "sum += w * line[first[i] + t];",
            "warp_coarse", "nan", "0 times a NaN, where rows are fetched one by one",
        ),
        Mutant(
            "coarse_share_zero_reads_what_is_not_finite", "nan", "csrc/cpu/warp_coarse.cpp",
            "sum += w != 0 ? w * value : V{};",
            "sum += w * value;",
            "warp_coarse", "nan", "0 times a NaN; the adjoint pads with shares of 0",
        ),
        Mutant(
            "coarse_edge_is_forgotten", "threads", "csrc/cpu/warp_coarse.cpp",
            "for (int64_t slab = 1; slab < a.n_slabs; ++slab)",
            "for (int64_t slab = 2; slab < a.n_slabs; ++slab)",
            "warp_coarse", "repeats", "right with one thread",
        ),
        Mutant(
            "coarse_edge_of_the_last_sample", "batch", "csrc/cpu/warp_coarse.cpp",
            "std::fill(before.begin(), before.end(), A(0));",
            ";",
            "warp_coarse", "reference or repeats", "what is left of the slab before",
        ),
        Mutant(
            "coarse_affine_is_left_out_of_the_gradient", "affine", "csrc/cpu/warp_coarse.cpp",
            "for (int i = 0; i < count; ++i) d[i] += double(u[i]);",
            ";",
            "warp_coarse", "reference", "a matrix in the place of the displacement",
        ),
        Mutant(
            "coarse_reference_forgets_the_affine", "affine", "fastreg/ops/warp_coarse.py",
            "du = torch.ops.fastreg.warp_bwd(grad, image, u, affine, \"linear\", padding, *needs)[1]",
            "du = torch.ops.fastreg.warp_bwd(grad, image, u, None, \"linear\", padding, *needs)[1]",
            "warp_coarse", "reference", "where no kernel answers, the gradient is taken elsewhere",
        ),
    ]  # fmt: skip
