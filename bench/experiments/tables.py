"""The experiments' stored tables as Markdown."""

import re
from dataclasses import dataclass

from bench import common
from bench.experiments.common import GROUP
from bench.markdown import grouped, measured, number, table


@dataclass(frozen=True)
class Table:
    """name: of the csv. columns: header -> column, or a format of several ("{dice} ± {dice_sd}"). measured: or the same anywhere."""

    name: str
    title: str
    columns: dict
    measured: bool = True


TABLES = (
    Table(
        "prdfe",
        "PRDFE, table I: figures with known motion, mean and sd over the pairs",
        {
            "method": "label",
            "motion": "deformation",
            "image MSE": "{image_mse_mean} ± {image_mse_sd}",
            "field MSE, voxels²": "{field_mse_mean} ± {field_mse_sd}",
            "sd over seeds": "field_mse_seeds_sd",
            "inside the figures": "figures_mse_mean",
            "folding": "folding",
            "steps": "steps",
            "seconds of training": "train_seconds",
            "paper: image": "paper_image_mse",
            "paper: field": "paper_field_mse",
        },
    ),
    Table(
        "rrn",
        "RRN, optimised on one pair (lungct_dirlab4dct_case1, 300 landmarks, or the thorax phantom); paper: other scans",
        {
            "method": "method",
            "TRE, mm": "{tre_mm} ± {tre_sd}",
            "TRE, refined landmarks": "tre_refined_mm",
            "TRE near the wall": "tre_wall_mm",
            "paper, mm": "paper_mm",
            "folding": "folding",
            "steps": "steps",
            "seconds of training": "seconds",
            "what": "note",
        },
    ),
    Table(
        "r2n2",
        "R2N2, slices of a simulated breathing cycle to its mean phase (lungmr_proton), people it has not seen",
        {
            "method": "label",
            "TRE, mm": "{tre_mean} ± {tre_sd}",
            "largest of a slice's images": "tre_slice",
            "to inhale": "tre_to_inhale",
            "to exhale": "tre_to_exhale",
            "seconds a pair": "seconds",
            "numbers of a transform": "numbers",
            "steps": "steps",
            "seconds of training": "train_seconds",
            "seed": "seed",
            "paper: TRE": "paper_tre",
        },
    ),
    Table(
        "r2n2_speed",
        "R2N2 at the paper's T = 25 and 256 x 256, beside the B-spline",
        {
            "method": "label",
            "seconds a pair": "seconds",
            "p20 to p80": "{p20} to {p80}",
            "times as fast": "faster",
            "numbers of a transform": "numbers",
            "% of the B-spline's": "share",
            "paper: seconds": "paper_seconds",
            "paper: times as fast": "paper_faster",
            "paper: numbers": "paper_numbers",
            "paper: %": "paper_share",
        },
    ),
    Table(
        "lindef_beta",
        "LinDef's loss at 60x128x96 (lungmr_proton): Phi optimised alone, and nets, on held-out pairs",
        {
            "what, reduction, beta": "method",
            "pairs": "pairs",
            "squared error": "held_out_mse",
            "Dice": "dice",
            "folding": "folding",
            "share of Phi beyond 1 ± 0.01": "moved",
            "steps": "steps",
            "seconds of training": "seconds",
        },
    ),
    Table(
        "lindef",
        "LinDef, lungs after random rigid offsets (lungmr_proton), people it has not seen",
        {
            "method": "method",
            "Dice": "{dice} ± {dice_sd}",
            "paper": "paper_dice",
            "folding": "folding",
            "steps": "steps",
            "seconds of training": "seconds",
            "ended": "ended",
            "what": "note",
        },
    ),
    Table(
        "f3rnet_parameters",
        "F3RNet, parameters: the paper's table (thousands) and both readings of it; `fit` was chosen to come near",
        {"net": "net", "paper": "paper_thousands", "fit": "{fit} ({fit_off})", "all": "{all} ({all_off})"},
        measured=False,
    ),
    Table(
        "f3rnet",
        "F3RNet with MIND, T1 to T2 (spinalmr_t1t2_sct)",
        {
            "method": "method",
            "Dice of the cord": "dice",
            "ASSD, mm": "assd_mm",
            "folding": "folding",
            "steps": "steps",
            "seconds of training": "seconds",
        },
    ),
    Table(
        "inter_subject",
        "Nets trained on pairs of people for the same time (hippocampusmr_msd04), asked about people they have not seen",
        {
            "method": "method",
            "Dice": "{dice} ± {dice_sd}",
            "seconds a pair": "seconds_per_pair",
            "folding": "folding",
            "parameters": "parameters",
            "steps": "steps",
            "seconds of training": "seconds",
            "what was narrowed": "note",
        },
    ),
)


def _cell(row, column):
    if "{" not in column:
        return number(row.get(column, ""))  # some methods have columns of their own
    first, *others = re.findall(r"{(\w+)}", column)
    if row[first] == "":
        return ""
    texts = {first: number(row[first])}
    decimals = len(texts[first].partition(".")[2])
    for name in others:
        # A deviation to the digits of its mean.
        texts[name] = f"{float(row[name]):.{decimals}f}" if "±" in column else number(row[name])
    return column.format(**texts)


def sections(results):
    """name -> a stored table, with where and when it was measured."""
    parts = {}
    for t in TABLES:
        rows = common.read_rows(results / "experiments" / f"{t.name}.csv")
        groups = list(grouped(rows, *GROUP).values())
        for mine in groups if t.measured else groups[:1]:
            command = f"python -m bench.experiments.{t.name.split('_parameters')[0]}"
            if (setting := mine[0]["setting"]) != "small":
                command += f" --setting {setting}"
            where = f" {measured(mine)}" if t.measured else ""
            cells = [[_cell(row, c) for c in t.columns.values()] for row in mine]
            text = f"**{t.title}** (`{command}`).{where}\n\n{table(list(t.columns), cells)}"
            parts[t.name] = "\n\n".join(filter(None, (parts.get(t.name), text)))
    return parts
