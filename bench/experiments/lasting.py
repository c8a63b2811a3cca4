"""Training of hours beside other work: what a process did is gone on with by the next one, bit for bit."""

from dataclasses import asdict

import torch

from bench.common import say
from bench.experiments import common
from fastreg._files import replacing
from fastreg.training import Training


def train(model, pairs, held_out, recipe, *, minutes, path=None, steps=None, every=120.0, seed=0):
    """Trains until minutes or steps are over, looks at the held-out loss every so many seconds, and leaves the model with the
    weights of the best look.

    path: of a file that holds all of it after each look; where it is there, training goes on with it, until the minutes and
    steps of this call. What came after its last look is done again. Unusable where it is of another training.
    Returns common.Trained; its seconds are of training alone, over all processes.
    """
    device = next(model.parameters()).device
    training, done, kept = Training(model, pairs, recipe, seed=seed), common.Trained(), None
    about = {"model": repr(model), "recipe": asdict(recipe), "seed": seed, "pairs": len(pairs)}
    if path is not None and path.exists():
        stored = torch.load(path, map_location=device, weights_only=True)
        if stored["about"] != about:
            raise common.Unusable(f"{path} is of another training than the one that is asked for")
        training.restore(stored["training"])
        done, kept = common.Trained(**stored["done"]), stored["kept"]

    def ended():
        if done.seconds >= minutes * 60:
            return "time"
        return "steps" if steps is not None and done.steps >= steps else ""

    next_look = done.seconds + every
    while not ended():
        begin = common.clock(device)
        training.advance()
        done.seconds += common.clock(device) - begin
        done.steps = training.step
        if done.seconds < next_look and not ended():
            continue
        next_look = done.seconds + every
        loss = common.held_out_loss(model, held_out)
        done.looks.append((done.steps, done.seconds, loss))
        say(f"    step {done.steps}, {done.seconds:.0f} s: held-out loss {loss:.5f}")
        if loss < done.best:
            done.best, done.best_step = loss, done.steps
            kept = {name: t.clone() for name, t in model.state_dict().items()}
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            state = {"about": about, "training": training.state(), "done": asdict(done), "kept": kept}
            with replacing(path) as temporary:
                torch.save(state, temporary)
    done.ended = ended()
    model.load_state_dict(kept)
    model.eval()
    return done
