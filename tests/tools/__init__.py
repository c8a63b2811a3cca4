"""Other tools beside us: each recipe makes a transform with the tool and applies it, and applies one that we wrote; .ci/tools runs them.

A recipe is a script of the tool's own environment (no fastreg in it):
    RECIPE make SCENE OUT            the tool's files in OUT, and moved.nii.gz: the moving image as the tool moves it by them
    RECIPE use SCENE OUT FILE...     moved.nii.gz: the moving image as the tool moves it by what fastreg has written
SCENE holds fixed.nii.gz, moving.nii.gz and u.npz (see scene.py).
"""
