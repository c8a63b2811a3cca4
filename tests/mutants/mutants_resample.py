def mutants(Mutant):
    return [
        Mutant(
            "resample_far_border_is_rounded", "border", "csrc/cpu/resample.cpp",
            "return f == A(1) ? b : a + f * (b - a);",
            "return a + f * (b - a);",
            "io", "identity", "the last voxel of an axis is no longer itself",
        ),
        Mutant(
            "resample_ends_at_its_centres", "border", "csrc/cpu/resample.cpp",
            "constexpr double kReach = 0.5 + 1e-9;",
            "constexpr double kReach = 1e-9;",
            "resample", "reference", "half a voxel beyond the outermost centres is inside",
        ),
        Mutant(
            "resample_ties_go_down", "rounding", "csrc/common/resample.h",
            "return int32_t(std::floor(at + 0.5));",
            "return int32_t(std::ceil(at - 0.5));",
            "resample", "tie", "of two voxels as near ITK takes the upper one",
        ),
        Mutant(
            "resample_cuts", "rounding", "csrc/common/resample.h",
            "A whole = std::nearbyint(x);",
            "A whole = std::trunc(x);",
            "resample", "rounded or every_type", "whole numbers are the nearest",
        ),
        Mutant(
            "resample_wraps", "range", "csrc/common/resample.h",
            "whole = whole < most ? whole : most;",
            "whole = whole < most ? whole : whole;",
            "resample", "clamped", "what a type does not hold is its most",
        ),
        Mutant(
            "labels_are_interpolated", "labels", "fastreg/_moved.py",
            'return "nearest" if n else "linear", n > 0',
            'return "linear", n > 0',
            "apply", "labels", "values that no label has",
        ),
    ]  # fmt: skip
