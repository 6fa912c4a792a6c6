"""Let a model of train_gpt.py write.

    python examples/generate.py --checkpoint runs/gpt/checkpoint
    python examples/generate.py --checkpoint runs/gpt/checkpoint --prompt "The class statement" --temperature 0.5

One process reads the checkpoint of any strategy and number of ranks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from fabriclite import Fabric
from gpt import GPT, GPTConfig


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="what train_gpt.py saved")
    parser.add_argument("--prompt", default="The ")
    parser.add_argument("--tokens", type=int, default=400, help="bytes to write")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest byte each time")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--seed", type=int, default=1337)
    args = parser.parse_args()
    if not args.prompt:
        parser.error("--prompt must not be empty: the model continues what it is given")
    return args


def main() -> None:
    args = parse_args()
    fabric = Fabric(devices=1, precision=args.precision)
    fabric.launch()

    config = GPTConfig(**json.loads((args.checkpoint.parent / "model.json").read_text()))
    with fabric.init_module(empty_init=True):  # every weight comes from the checkpoint
        model = GPT(config)
    model = fabric.setup(model)
    fabric.load(args.checkpoint, {"model": model})
    model.eval()

    prompt = torch.tensor([list(args.prompt.encode())], device=fabric.device)
    generator = torch.Generator(fabric.device).manual_seed(args.seed)
    written = model.generate(prompt, args.tokens, temperature=args.temperature, generator=generator)
    fabric.print(bytes(written[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
