def mutants(Mutant):
    return [
        Mutant(
            "convert_fsl_x_is_not_flipped", "sign", "fastreg/convert/fsl.py",
            "        m[0] *= -1",
            "        m[0] *= 1",
            "fsl", "reads", "mm from the other end",
        ),
        Mutant(
            "convert_fsl_is_always_relative", "kind", "fastreg/convert/fsl.py",
            "absolute = _spread(array) > _spread(array - here)",
            "absolute = False",
            "fsl", "reads", "positions taken for displacements",
        ),
        Mutant(
            "convert_niftyreg_keeps_ras", "sign", "fastreg/convert/niftyreg.py",
            "vectors = array * FLIP - (positions(grid) if p1 == 0 else 0)",
            "vectors = array - (positions(grid) if p1 == 0 else 0)",
            "niftyreg", "reads", "RAS taken for LPS",
        ),
        Mutant(
            "convert_niftyreg_writes_lps", "sign", "fastreg/convert/niftyreg.py",
            "write_vectors(target, target.vectors * FLIP, axes=5, code=1007",
            "write_vectors(target, target.vectors, axes=5, code=1007",
            "niftyreg", "writes", "LPS given for RAS",
        ),
        Mutant(
            "convert_freesurfer_keeps_ras", "sign", "fastreg/convert/freesurfer.py",
            "Field(array * FLIP, grid)",
            "Field(array, grid)",
            "freesurfer", "reads", "RAS taken for LPS",
        ),
        Mutant(
            "convert_mrtrix_takes_displacements", "kind", "fastreg/convert/mrtrix.py",
            "vectors = array * FLIP - positions(grid)",
            "vectors = array * FLIP",
            "mrtrix", "reads", "positions taken for displacements",
        ),
        Mutant(
            "convert_voxels_in_the_order_of_files", "axes", "fastreg/convert/voxels.py",
            "voxels = array.transpose(*range(place.nd)[::-1], place.nd)[..., ::-1]",
            "voxels = array.transpose(*range(place.nd)[::-1], place.nd)",
            "voxels", "reads", "x taken for z",
        ),
        Mutant(
            "convert_dipy_takes_forward", "kind", "fastreg/convert/dipy.py",
            "backward = _nifti.values(source.path, image)[..., 1]",
            "backward = _nifti.values(source.path, image)[..., 0]",
            "dipy", "reads", "the other way",
        ),
        Mutant(
            "convert_dicom_vector_first", "composition", "fastreg/convert/dicom.py",
            "middle = start @ before[:3, :3].T + before[:3, 3] + array",
            "middle = (start + array) @ before[:3, :3].T + before[:3, 3]",
            "dicom", "matrices", "M_pre x + D, not M_pre (x + D)",
        ),
        Mutant(
            "convert_lists_are_reversed", "composition", "fastreg/convert/_chain.py",
            "for step in reversed(self.steps[:k]):",
            "for step in self.steps[:k]:",
            "itk", "order", "the first of the list moves a point first",
        ),
        Mutant(
            "convert_composites_are_reversed", "composition", "fastreg/convert/itk.py",
            "for part in reversed(parts) for leaf in _flat(part)]",
            "for part in parts for leaf in _flat(part)]",
            "itk", "composite", "ITK applies the last one first",
        ),
        Mutant(
            "convert_fields_go_on_beyond_their_grid", "border", "fastreg/convert/_chain.py",
            "return out if border else np.where(inside, out, 0)",
            "return out",
            "itk", "two_fields", "ITK moves nothing there",
        ),
        Mutant(
            "convert_undefined_is_not_moved", "nan", "fastreg/convert/_chain.py",
            "> SOME] = np.nan",
            "> SOME] = 0",
            "mrtrix", "undefined", "outside, not where it was",
        ),
        Mutant(
            "convert_believes_from", "kind", "fastreg/convert/__init__.py",
            "if wanted is not None and (wanted.name in names or",
            "if wanted is not None and (True or",
            "niftyreg fsl itk", "reads or its_name or fields", "what a file says of itself decides",
        ),
        Mutant(
            "convert_integers_are_fields", "dtype", "fastreg/io/_displacement.py",
            "if image.GetPixelID() not in (sitk().sitkVectorFloat32, sitk().sitkVectorFloat64):",
            "if False:",
            "itk interoperability", "integers or colours", "a picture is no field",
        ),
    ]  # fmt: skip
