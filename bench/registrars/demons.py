"""SimpleITK: diffeomorphic Demons at three resolutions, on intensities that ITK's filter has matched; its default smoothing."""

import sys

import SimpleITK

LEVELS, ITERATIONS = (4, 2, 1), 100

fixed, moving, out, threads = sys.argv[1:]
SimpleITK.ProcessObject.SetGlobalDefaultNumberOfThreads(int(threads))
fixed, moving = (SimpleITK.ReadImage(path, SimpleITK.sitkFloat32) for path in (fixed, moving))
moving = SimpleITK.HistogramMatching(moving, fixed, 1024, 7, True)
finer = SimpleITK.ResampleImageFilter()
finer.SetUseNearestNeighborExtrapolator(True)
field = None
for factor in LEVELS:
    images = fixed, moving
    if factor > 1:
        shrink = [max(1, min(factor, n // 8)) for n in fixed.GetSize()]
        sigma = [0.5 * factor * s for s in fixed.GetSpacing()]
        images = [SimpleITK.Shrink(SimpleITK.SmoothingRecursiveGaussian(i, sigma), shrink) for i in images]
    demons = SimpleITK.DiffeomorphicDemonsRegistrationFilter()
    demons.SetNumberOfIterations(ITERATIONS)
    begin = []
    if field is not None:
        finer.SetReferenceImage(images[0])
        begin = [finer.Execute(field)]
    field = demons.Execute(*images, *begin)
SimpleITK.WriteImage(field, f"{out}/field.nii.gz")
