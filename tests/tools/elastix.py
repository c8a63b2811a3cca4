"""itk-elastix: a B-spline after an affine; its deformation field holds both."""

import itk
from recipe import main


def make(scene, out):
    fixed, moving = (itk.imread(str(scene / f"{name}.nii.gz"), itk.F) for name in ("fixed", "moving"))
    parameters = itk.ParameterObject.New()
    for kind in ("affine", "bspline"):
        chosen = parameters.GetDefaultParameterMap(kind, 2)
        chosen["FinalBSplineInterpolationOrder"] = ["1"]
        chosen["MaximumNumberOfIterations"] = ["60"]
        parameters.AddParameterMap(chosen)
    moved, found = itk.elastix_registration_method(
        fixed, moving, parameter_object=parameters, output_directory=str(out)
    )  # which gets TransformParameters.0.txt and .1.txt
    itk.imwrite(moved, str(out / "moved.nii.gz"))
    itk.imwrite(itk.transformix_deformation_field(moving, found), str(out / "field.nii.gz"))


main(make)
