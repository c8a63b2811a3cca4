"""itk-elastix: its default B-spline parameters."""

import sys

import itk

fixed, moving, out, _ = sys.argv[1:]  # ITK reads the number of threads from the environment
parameters = itk.ParameterObject.New()
parameters.AddParameterMap(parameters.GetDefaultParameterMap("bspline"))
moving = itk.imread(moving, itk.F)
_, found = itk.elastix_registration_method(itk.imread(fixed, itk.F), moving, parameter_object=parameters)
itk.imwrite(itk.transformix_deformation_field(moving, found), f"{out}/field.nii.gz")
