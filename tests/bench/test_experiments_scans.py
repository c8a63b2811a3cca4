"""The experiments on real scans run, and store a table and a picture: a few steps each, on small images where they can be."""

import os

import pytest
import torch

from bench import common as bench
from bench.experiments import common, f3rnet, inter_subject, lindef, lindef_beta, rrn
from fastreg.models import VoxelMorph
from fastreg.training import Recipe, Sample

QUICK = ["--steps", "2", "--minutes", "5", "--threads", "2", "--device", "cpu"]
needs_scans = pytest.mark.skipif(
    not os.environ.get("FASTREG_DATA"), reason="FASTREG_DATA, the folder with the scans, is not set"
)


def ran(experiment, folder, *arguments, name=None):
    name = name or experiment.__name__.split(".")[-1]
    assert experiment.main([*QUICK, "--results", str(folder), *arguments]) == 0
    assert (folder / f"{name}_partial.png").stat().st_size > 10_000
    rows = {r["method"]: r for r in bench.read_rows(folder / f"{name}.csv")}
    for r in rows.values():
        assert 0 <= float(r["folding"]) < 0.5
    return rows


@pytest.mark.slow
@needs_scans
def test_rrn(tmp_path):
    methods = ["RRN", "VoxelMorph-2"]
    rows = ran(rrn, tmp_path, "--size", "16", "32", "32", "--methods", *methods)
    assert list(rows) == ["identity", *methods]
    assert float(rows["identity"]["tre_mm"]) == pytest.approx(3.89, abs=0.01)
    assert all(1 < float(r["tre_mm"]) < 100 for r in rows.values())
    assert rows["RRN"]["steps"] == "2"
    assert rows["RRN"]["ended"] == "steps"


@pytest.mark.slow
def test_rrn_of_the_phantom(tmp_path):
    assert (
        rrn.main(
            [
                *QUICK,
                "--results",
                str(tmp_path),
                "--setting",
                "thorax-20",
                "--size",
                "16",
                "32",
                "32",
                "--methods",
                "RRN",
            ]
        )
        == 0
    )
    assert (tmp_path / "rrn_thorax-20_partial.png").stat().st_size > 10_000
    identity, net = bench.read_rows(tmp_path / "rrn.csv")
    assert float(identity["tre_wall_mm"]) > float(identity["tre_mm"]) - 5 > 0
    assert identity["tre_refined_mm"] == identity["paper_mm"] == ""
    assert 0 < float(net["tre_wall_mm"]) < 200


@pytest.mark.slow
@needs_scans
def test_lindef(tmp_path):
    methods = ["LinDef", "LinDef without affine", "LinDef, affine alone"]
    quick = ["--offsets", "1", "--size", "8", "16", "12", "--state", str(tmp_path / "state")]
    rows = ran(lindef, tmp_path, *quick, "--methods", *methods)
    assert list(rows) == ["identity", *methods]
    # After two steps from the identity nothing has changed much.
    assert all(0.3 < float(r["dice"]) < 0.9 for r in rows.values())
    assert all(0 < float(r["held_out_mse"]) < 0.2 for r in rows.values())
    # Nothing is left to do.
    seconds = rows["LinDef"]["seconds"]
    assert ran(lindef, tmp_path, *quick, "--methods", *methods)["LinDef"]["seconds"] == seconds


@pytest.mark.slow
@needs_scans
def test_lindef_beta(tmp_path, monkeypatch):
    monkeypatch.setattr(lindef_beta, "STEPS", 20)
    quick = [*QUICK, "--results", str(tmp_path), "--size", "15", "32", "24"]
    names = ["Phi alone, keras, 1e-06", "Phi alone, mean, 1e-06", "net, mean, 1e-06"]
    assert lindef_beta.main([*quick, "--methods", *names]) == 0
    rows = {r["method"]: r for r in bench.read_rows(tmp_path / "lindef_beta.csv")}
    assert list(rows) == ["identity", "identity, two pairs", *names]
    before = float(rows["identity, two pairs"]["held_out_mse"])
    assert all(float(rows[name]["held_out_mse"]) < before for name in names[:2])
    assert rows["net, mean, 1e-06"]["steps"] == "2"


@pytest.mark.slow
@needs_scans
def test_f3rnet(tmp_path):
    rows = ran(f3rnet, tmp_path, "--methods", "F3RNet mrb", "fastreg.register", "Demons")
    assert list(rows) == ["identity", "F3RNet mrb", "fastreg.register", "Demons"]
    assert float(rows["identity"]["dice"]) == pytest.approx(0.852, abs=0.001)
    assert float(rows["fastreg.register"]["dice"]) > 0.9
    table = {r["net"]: r for r in bench.read_rows(tmp_path / "f3rnet_parameters.csv")}
    assert len(table) == 9
    assert table["F3RNet mrb"]["fit"] == "288083"


@pytest.mark.slow
@needs_scans
def test_inter_subject(tmp_path):
    rows = ran(inter_subject, tmp_path, "--methods", "VoxelMorph-1", "PRDFE")
    assert list(rows) == ["identity", "VoxelMorph-1", "PRDFE"]
    assert float(rows["identity"]["dice"]) == pytest.approx(0.590, abs=0.001)


@pytest.mark.slow
@needs_scans
def test_a_run_of_some_methods_leaves_the_rows_of_the_others(tmp_path):
    size = ["--size", "16", "32", "32"]
    ran(rrn, tmp_path, *size, "--methods", "VoxelMorph-2")
    rows = ran(rrn, tmp_path, *size, "--methods", "RRN", "--steps", "3")
    assert [(m, r["steps"]) for m, r in rows.items()] == [
        ("identity", ""),
        ("RRN", "3"),
        ("VoxelMorph-2", "2"),
    ]
    assert not (tmp_path / "rrn.png").exists(), "a picture of some is not one of all"
    for experiment in (rrn, lindef, f3rnet, inter_subject):
        assert experiment.main(["--methods", "nonsense", "--results", str(tmp_path)]) == 2


def test_rows_of_another_setting_stay(tmp_path):
    doc, minutes, methods = "", {"small": 1, "full": 2}, ("a", "b")
    for arguments, value in (([], 1), (["--setting", "full"], 2), (["--methods", "b"], 3)):
        args = common.Parser(doc, minutes, methods).parse_args(
            [*arguments, "--results", str(tmp_path), "--device", "cpu"]
        )
        assert args.minutes == minutes[args.setting]
        common.store(args, "made", [{"method": m, "value": value} for m in ("identity", *args.methods)])
    rows = [(r["setting"], r["method"], r["value"]) for r in bench.read_rows(tmp_path / "made.csv")]
    assert sorted(rows) == [
        ("full", "a", "2"), ("full", "b", "2"), ("full", "identity", "2"),
        ("small", "a", "1"), ("small", "b", "3"), ("small", "identity", "3"),
    ]  # fmt: skip


def test_rows_of_other_seeds_stay(tmp_path):
    for seed, value in ((0, 1), (1, 2), (1, 3), (0, 4)):
        parser = common.Parser("", {"small": 1}, ("a", "b"), long=True)
        args = parser.parse_args(["--seed", str(seed), "--results", str(tmp_path), "--device", "cpu"])
        rows = [{"method": m, "value": value, "seed": args.seed} for m in args.methods]
        common.store(args, "made", [{"method": "identity", "value": value}, *rows])
    rows = [(r["method"], r["seed"], r["value"]) for r in bench.read_rows(tmp_path / "made.csv")]
    assert rows == [("identity", "", "4"), ("a", "0", "4"), ("a", "1", "3"), ("b", "0", "4"), ("b", "1", "3")]


def small_net():
    torch.manual_seed(0)
    return VoxelMorph(encoder=(2, 2, 2, 2), decoder=(2, 2, 2, 2, 2, 2), ndim=2, similarity="mse")


def test_a_training_goes_on_from_its_state(tmp_path):
    """Bit for bit, best weights too; one that has ended is not trained again, and another's state is refused."""
    draw = torch.Generator().manual_seed(0)
    pairs = [Sample(str(k), *torch.rand(2, 1, 1, 16, 16, generator=draw)) for k in range(3)]

    def trained(steps, state=None, rate=1e-2):
        model, told, recipe = small_net(), [], Recipe(learning_rate=rate)
        options = {"minutes": 5, "steps": steps, "patience": 99, "tell": told.append, "state": state}
        done = common.train(model, pairs[:2], pairs[2:], recipe, **options)
        return done, torch.cat([p.detach().flatten() for p in model.parameters()]), len(told)

    state = tmp_path / "folder" / "net.pt"
    whole, expected, _ = trained(9)
    trained(4, state)
    part, weights, told = trained(9, state)
    assert told == 1 + 5
    again, kept, told = trained(9, state)
    assert told == 1
    for done, found in ((part, weights), (again, kept)):
        assert torch.equal(found, expected)
        assert (done.steps, done.best, done.best_step, done.ended) == (
            9,
            whole.best,
            whole.best_step,
            "steps",
        )
        assert [look[::2] for look in done.looks] == [look[::2] for look in whole.looks]
    with pytest.raises(common.Unusable, match="is of another training"):
        trained(9, state, 1e-3)


def test_a_recipe_that_watches_validation_looks_at_the_held_out_pairs():
    pairs = [Sample("a", *torch.rand(2, 1, 1, 16, 16, generator=torch.Generator().manual_seed(0)))]
    recipe = Recipe(learning_rate=1e-12, patience=2, epoch=2, watch="validation", tolerance=1e-3)
    done = common.train(small_net(), pairs, pairs, recipe, minutes=5, steps=50, tell=lambda line: None)
    assert (done.steps, done.ended) == (6, "no improvement")


def test_rows_of_other_cases_do_not_go_into_the_table(capsys):
    for arguments in (["--size", "8", "8", "8"], ["--offsets", "1"]):
        assert lindef.main(arguments) == 2
        assert f"with {arguments[0]} the rows are not those of the table" in capsys.readouterr().err


@needs_scans
def test_training_pairs_follow_from_their_number():
    scans = inter_subject.images(common.scans("hippocampusmr_msd04"))
    people = inter_subject.People(scans[:3], 2)
    again, other = people[5], people[6]
    assert (people[5].fixed == again.fixed).all()
    assert not (other.fixed == again.fixed).all()


def test_without_the_scans_there_is_one_line(monkeypatch, capsys):
    monkeypatch.delenv("FASTREG_DATA", raising=False)
    for experiment in (rrn, lindef, f3rnet, inter_subject):
        assert experiment.main(["--no-store"]) == 2
        assert "FASTREG_DATA" in capsys.readouterr().err
