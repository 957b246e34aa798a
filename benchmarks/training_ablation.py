"""What each choice of training is worth: the paper's Figure 4 and Tables 4 and 6, and the objectives, in simulated tau.

    python benchmarks/training_ablation.py recipes/smollm2-135m-demo.yaml --out runs/ablation \\
        --variants dflash,ttt,teacher_forcing,curriculum --seeds 0,1,2 --steps 600 \\
        --greedy answers-t0.jsonl --sampled answers-t1.jsonl

Every variant is trained from the recipe for the same steps on the same conversations in the same order, and measured on
every block of answers that it was not trained on (`domino-spec regenerate` writes them; their ids name the suite, as in
gsm8k/17). Ratios are paired, with 95% intervals over answers. Runs resume; finished ones are not trained again.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from domino_spec.bench.simulate import render, summarize
from domino_spec.draft.load import load_draft
from domino_spec.files import write_json
from domino_spec.recipe import Recipe, load_recipe
from domino_spec.target.load import load_target
from domino_spec.training.data import load_sequences
from domino_spec.training.evaluate import Simulated, SimulatedTau, simulated_tau
from domino_spec.training.features import capture_features
from domino_spec.training.run import run_training

VARIANTS: dict[str, dict[str, Any]] = {
    "dflash": {"head": None, "objective": "cross_entropy"},
    "ttt": {"causal_encoder": "training_time_test", "curriculum": "off", "objective": "cross_entropy"},
    "teacher_forcing": {"curriculum": "off", "objective": "cross_entropy"},
    "curriculum": {"objective": "cross_entropy"},
    "kl": {"objective": "kl"},
    "tv": {"objective": "tv"},
    "ce_tv": {"objective": "ce_tv"},
    "lk_alpha": {"objective": "lk_alpha"},
    "lk_hybrid": {"objective": "lk_hybrid"},
    "acceptance": {"objective": "cross_entropy", "position_weights": "acceptance"},
}
"""Changes to the recipe's `training`; `head` to its draft."""


def variant_recipe(recipe: Recipe, variant: str, steps: int | None, seed: int) -> Recipe:
    """The recipe with one variant's changes."""
    changes = dict(VARIANTS[variant])
    draft = recipe.draft
    if "head" in changes:
        draft = dataclasses.replace(draft, head=changes.pop("head"))
    if steps is not None:
        changes |= {"steps": steps, "epochs": None}
    return dataclasses.replace(recipe, draft=draft, training=dataclasses.replace(recipe.training, seed=seed, **changes))


def by_answer(accepted: Tensor, tau: SimulatedTau, answers: int, drafts: int) -> Simulated:
    """Accepted drafts of every block, as the tables of `bench.simulate` take them."""
    parts = [accepted[tau.sequences == i] for i in range(answers)]
    return Simulated([torch.arange(len(p)) for p in parts], parts, [torch.full_like(p, drafts) for p in parts])


def main() -> None:
    """Train what is missing, measure everything, print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--variants", default="dflash,ttt,teacher_forcing,curriculum")
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--greedy", type=Path, required=True, help="Answers at temperature 0.")
    parser.add_argument("--sampled", type=Path, help="Answers at temperature 1.")
    parser.add_argument("--against", default="dflash", help="Ratios are to this variant of the same seed.")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe)
    target = load_target(recipe.target, dtype=getattr(torch, recipe.data.feature_dtype), pack=False)
    texts = {"T=0": arguments.greedy} | ({"T=1": arguments.sampled} if arguments.sampled else {})

    measured: dict[str, dict[str, Simulated]] = {name: {} for name in texts}
    ids: dict[str, list[str]] = {}
    seeds = list(map(int, arguments.seeds.split(",")))
    for seed in seeds:
        for variant in arguments.variants.split(","):
            out = arguments.out / f"{variant}-{seed}"
            settings = variant_recipe(recipe, variant, arguments.steps, seed)
            run_training(settings, out, features=arguments.out / "features")
            draft = load_draft(out / "draft", target, dtype=torch.float32)
            layers = tuple(dict.fromkeys((*draft.config.target_layer_ids, target.num_layers - 1)))
            for name, path in texts.items():
                answers = load_sequences(path, recipe.data.max_length, target.vocab_size)
                ids[name] = [a.id for a in answers]
                source = capture_features(target, answers, layers, arguments.out / f"features-{name[2:]}")
                sampled_by = target if name == "T=1" else None
                tau = simulated_tau(draft, answers, source, 10**6, batch_size=1, sampled_by=sampled_by)
                for head, accepted in (("on", tau.accepted), ("off", tau.accepted_head_off)):
                    label = f"{variant} seed {seed}, head {head}"
                    measured[name][label] = by_answer(accepted, tau, len(answers), draft.config.max_drafts)
                print(f"{variant}, seed {seed}, {name}: {tau.tau:.3f} / {tau.tau_head_off:.3f}", flush=True)

    for name, results in measured.items():
        for seed in seeds:
            of_seed = {label: found for label, found in results.items() if f" seed {seed}," in label}
            reference = f"{arguments.against} seed {seed}, head on"
            reference = reference if reference in of_seed else next(iter(of_seed))
            entries = summarize(of_seed, ids[name], reference)
            print(f"\n{name}, seed {seed}\n\n{render(entries, reference)}")
            write_json(entries, arguments.out / f"ablation-{name[2:]}-{seed}.json")


if __name__ == "__main__":
    main()
