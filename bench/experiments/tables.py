"""The experiments' stored tables as Markdown, for the README."""

from dataclasses import dataclass

from bench import common
from bench.markdown import grouped, measured, number, table


@dataclass(frozen=True)
class Table:
    """name: of the csv. columns: header -> column, or a format of several ("{dice} ± {dice_sd}")."""

    name: str
    title: str
    columns: dict


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
        "RRN, optimised on one pair (lungct_dirlab4dct_case1, 300 landmarks); paper: other scans",
        {
            "method": "method",
            "TRE, mm": "{tre_mm} ± {tre_sd}",
            "TRE, refined landmarks": "tre_refined_mm",
            "paper, mm": "paper_mm",
            "folding": "folding",
            "steps": "steps",
            "seconds of training": "seconds",
        },
    ),
    Table(
        "r2n2",
        "R2N2, lung slices with simulated breathing (lungmr_proton), people it has not seen",
        {
            "method": "label",
            "TRE, mm": "{tre_mean} ± {tre_sd}",
            "seconds a pair": "seconds",
            "numbers of a transform": "numbers",
            "steps": "steps",
            "seconds of training": "train_seconds",
            "paper: TRE": "paper_tre",
            "paper: seconds": "paper_seconds",
            "paper: numbers": "paper_numbers",
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
        },
    ),
    Table(
        "f3rnet_parameters",
        "F3RNet, parameters: the paper's table (thousands) and both readings of it; `fit` was chosen to come near",
        {"net": "net", "paper": "paper_thousands", "fit": "{fit} ({fit_off})", "all": "{all} ({all_off})"},
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
        return number(row[column])
    # A format of nothing is nothing.
    first = column.split("{")[1].split("}")[0]
    return column.format(**{k: number(v) for k, v in row.items()}) if row[first] != "" else ""


def markdown(results):
    """Every stored table, with where and when it was measured."""
    sections = []
    for t in TABLES:
        rows = common.read_rows(results / "experiments" / f"{t.name}.csv")
        for (setting, _), mine in grouped(rows, "setting", "device_name").items():
            command = f"python -m bench.experiments.{t.name.split('_parameters')[0]}"
            if setting != "small":
                command += f" --setting {setting}"
            cells = [[_cell(row, c) for c in t.columns.values()] for row in mine]
            sections.append(
                f"**{t.title}** (`{command}`). {measured(mine)}\n\n{table(list(t.columns), cells)}"
            )
    return "\n\n".join(sections) if sections else "No rows stored yet."
