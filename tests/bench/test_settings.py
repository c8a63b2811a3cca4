"""bench.settings: pairs made harder, rows, the tables of docs/settings.md."""

import pytest
import torch

from bench import common, settings


def pair():
    """A ball and a smaller one, two voxels aside, in noise."""
    axes = torch.meshgrid(*[torch.arange(24.0)] * 3, indexing="ij")
    noise = torch.rand(2, 1, 1, 24, 24, 24, generator=torch.Generator().manual_seed(0))

    def ball(x, radius):
        return (((axes[0] - 12) ** 2 + (axes[1] - 12) ** 2 + (axes[2] - x) ** 2) < radius**2)[None, None]

    labels = [ball(12, 7), ball(14, 6)]
    images = [label + 0.1 * n for label, n in zip(labels, noise, strict=True)]
    mask = settings.around(labels[0][0, 0].numpy())
    return settings.Scan(*images, (1.0, 1.0, 2.0), labels=[b.long() for b in labels], mask=mask)


@pytest.fixture
def known(monkeypatch):
    """Pairs of each kind, small."""
    pairs = {
        "ball 1": pair,
        "ball 2": pair,
        "ball 1, turned": lambda: settings.turned(pair()),
        "ball 1, blocked": lambda: settings.blocked(pair()),
    }
    some = {name: settings.SETTINGS[name] for name in ("defaults", "affine", "mask")}
    some["defaults"] = {}
    monkeypatch.setattr(settings, "PAIRS", pairs)
    monkeypatch.setattr(settings, "SETTINGS", some)


def test_a_turned_pair_is_turned_and_a_blocked_one_hides_its_block():
    plain, turned, blocked = pair(), settings.turned(pair()), settings.blocked(pair())
    still = torch.zeros(1, 3, 24, 24, 24)
    assert turned.score(still)[1] < plain.score(still)[1] - 0.2
    # A turn in mm: as many voxels of the ball as before, where its axes are of 1 and 2 mm.
    assert abs(int(turned.labels[1].sum()) / int(plain.labels[1].sum()) - 1) < 0.15
    changed = blocked.fixed != plain.fixed
    assert changed.any()
    assert not blocked.mask[changed].any()
    assert blocked.mask.mean() > 0.4


def test_options_are_shown_as_the_command_line_takes_them():
    from fastreg.cli import _parser

    for options in settings.SETTINGS.values():
        shown = settings.shown(options).replace("defaults", "").replace("--mask MASK", "").split()
        args = _parser().parse_args(["register", "a", "b", "-o", "c", *shown])
        for name, value in options.items():
            assert name == "mask" or getattr(args, name) == value


def test_rows_are_stored_once_and_become_tables(known, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(
        settings, "SECTIONS", {"some": (("defaults", "mask"), ("ball",)), "all": (None, None)}
    )
    assert settings.main(["--threads", "1"]) == 0
    rows = common.read_rows(tmp_path / settings.STORE)
    assert len(rows) == 3 * 3 + 2
    assert all(float(r["cpu_seconds"]) > 0 for r in rows)
    assert next(float(r["after"]) > float(r["before"]) for r in rows if r["pair"] == "ball 1, turned")
    capsys.readouterr()
    assert settings.main([]) == 0
    assert capsys.readouterr().out == ""
    assert common.read_rows(tmp_path / settings.STORE) == rows

    sections = settings.sections(tmp_path)
    header, _, before, *lines = sections["some"].splitlines()
    assert header == "| setting | ball, 2 pairs (Dice) | CPU time | most folding |"
    mean = sum(
        float(r["before"]) for r in rows if r["pair"] in ("ball 1", "ball 2") and r["setting"] == "mask"
    )
    assert before == f"| not registered | {mean / 2:.3f} |  |  |"
    assert [line.split(" | ")[0] for line in lines] == ["| defaults", "| `--mask MASK`"]
    assert lines[0].endswith("| 1.0 | 0 % |")
    # what was not run is empty, not zero
    blocked = next(line for line in sections["all"].splitlines() if line.startswith("| `--affine`"))
    assert "|  |" in blocked
    assert settings.sections(tmp_path / "nothing") == {}


def test_no_scans_is_one_line(monkeypatch, capsys):
    monkeypatch.delenv("FASTREG_DATA", raising=False)
    assert settings.main(["--no-store", "--pair", "lungs CT"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
