def mutants(Mutant):
    return [
        Mutant(
            "inverse_of_the_transposed_jacobian", "gradient", "csrc/common/invert_displacement.h",
            "q[i] += g[k] * row[k][i];",
            "q[i] += g[k] * row[i][k];",
            "invert_displacement", "gradcheck or reference or implicit", "the gradient is that of another matrix",
        ),
        Mutant(
            "inverse_slopes_of_the_first_place", "formula", "csrc/common/invert_displacement.h",
            "m[k][i] = k == i ? slope[k][i] + 1 : slope[k][i];",
            "m[k][i] = slope[k][i];",
            "invert_displacement", "residual or affine or iterations", "J without I: no Newton step",
        ),
        Mutant(
            "inverse_never_halves", "folds", "csrc/common/invert_displacement.h",
            "share *= A(0.5);",
            "share *= A(1);",
            "invert_displacement", "fall", "a step that leads nowhere is taken again and again",
        ),
        Mutant(
            "inverse_takes_the_last_guess", "folds", "csrc/common/invert_displacement.h",
            "if (largest < least) {",
            "if (true) {",
            "invert_displacement", "folds or reference", "what came nearest is forgotten",
        ),
        Mutant(
            "inverse_of_the_first_sample", "batch", "csrc/cpu/invert_displacement.cpp",
            "args.u = u[k].const_data_ptr();",
            "args.u = u[0].const_data_ptr();",
            "invert_displacement", "reference", "every sample is inverted by the first",
        ),
        Mutant(
            "inverse_of_another_voxel", "tail", "csrc/cpu/invert_displacement.cpp",
            "residual[kept] = residual[j], point[kept] = point[j];",
            "residual[kept] = residual[j], point[kept] = j;",
            "invert_displacement", "reference or residual", "what moves up in its block is written where it stands",
        ),
        Mutant(
            "inverse_of_a_degenerate_jacobian", "folds", "csrc/common/invert_displacement.h",
            "const A scale = A(-1) / d;",
            "const A scale = A(-1) / determinant;",
            "invert_displacement", "folds", "an infinite gradient where u folds",
        ),
    ]  # fmt: skip
