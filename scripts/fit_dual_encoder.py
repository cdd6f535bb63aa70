"""Fit the two projections of a VisionTextDualEncoder: a small model of images and texts, made of two trained towers.

    python scripts/fit_dual_encoder.py --vision PATH --text PATH --photos FOLDER --output out/dual

Both towers stay as they are. Each photo is seen in several crops, and the projections learn by the contrastive loss of
CLIP (Radford et al. 2021, arXiv:2103.00020, figure 3) that it belongs to "a photo of a {class}." of its own class. With
a hundred photos this gives a model for tests of image -> text, and no model of language.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoModel, AutoTokenizer, VisionTextDualEncoderModel

from hf_equiv import Encoder, load_images
from hf_equiv.formatting import first_name
from hf_equiv.models.zero_shot import PROMPT

CROPS, STEPS, DIM = 16, 400, 128


def main() -> int:
    """Fit the projections, and save the model with the image processor and tokenizer of its towers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("vision", "text", "photos", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    given = parser.parse_args()
    torch.manual_seed(0)
    photos, encoder = load_images(given.photos), Encoder.from_pretrained(given.vision, device="cpu")
    vision, words = AutoModel.from_pretrained(given.vision), AutoModel.from_pretrained(given.text)
    vision.pooler.dense.weight.data = 0.1 * torch.eye(vision.config.hidden_size)  # nearly the class token
    vision.pooler.dense.bias.data.zero_()
    model = VisionTextDualEncoderModel(vision_model=vision, text_model=words).eval()
    model.config.projection_dim = DIM
    names = sorted({str(label) for label in photos.labels})
    tokens = AutoTokenizer.from_pretrained(given.text)(
        [PROMPT.format(label=first_name(name)) for name in names], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        text = words(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
        seen = torch.stack([features(vision, encoder, photo.image) for photo in photos])  # (photos, crops, width)
    place = torch.tensor([names.index(str(label)) for label in photos.labels])
    for name, width in (("visual_projection", seen.shape[2]), ("text_projection", text.shape[1])):
        setattr(model, name, torch.nn.Linear(width, DIM, bias=False))
    learned = [*model.visual_projection.parameters(), *model.text_projection.parameters(), model.logit_scale]
    rule = torch.optim.AdamW(learned, lr=3e-3, weight_decay=0.1)
    for step in range(STEPS):
        own = torch.randint(CROPS, (len(seen),))
        z = normalize(model.visual_projection(seen[torch.arange(len(seen)), own]), dim=1)
        table = model.logit_scale.exp() * z @ normalize(model.text_projection(text), dim=1).T
        loss = cross_entropy(table, place)
        rule.zero_grad()
        loss.backward()
        rule.step()
        if step % 100 == 99:
            hits = (table.argmax(dim=1) == place).float().mean()
            print(f"step {step + 1}: loss {loss:.3f}, {hits:.0%} of the photos nearest to their class", file=sys.stderr)
    model.save_pretrained(given.output)
    AutoTokenizer.from_pretrained(given.text).save_pretrained(given.output)
    shutil.copy(given.vision / "preprocessor_config.json", given.output)
    return 0


def features(vision: torch.nn.Module, encoder: Encoder, image: object) -> Tensor:
    """Return the pooled state of some crops of a photo, (crops, width); the first is the photo as it is."""
    (whole,) = encoder.preprocess([image])
    side, crops = whole.shape[-1], [whole]
    for _ in range(CROPS - 1):
        size = int(torch.randint(side // 2, side, ()))
        top, left = (int(torch.randint(side - size + 1, ())) for _ in range(2))
        part = whole[None, :, top : top + size, left : left + size]
        crop = torch.nn.functional.interpolate(part, size=(side, side), mode="bilinear", antialias=True)[0]
        crops.append(crop.flip(-1) if torch.rand(()) < 0.5 else crop)
    std = encoder.pixel_std[:, None, None]
    mean = torch.tensor(encoder._preprocessor.scaling.mean)[:, None, None]
    return vision(pixel_values=(torch.stack(crops) - mean) / std).pooler_output


if __name__ == "__main__":
    sys.exit(main())
