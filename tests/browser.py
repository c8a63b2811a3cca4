"""A page opened in headless Chromium."""

import shutil
import subprocess

import pytest


def chromium(*arguments, width=1280):
    """What it prints, with these arguments."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs chromium")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},1400",
    ]
    return subprocess.run(
        [program, *options, *arguments], capture_output=True, text=True, timeout=120, check=True
    ).stdout
