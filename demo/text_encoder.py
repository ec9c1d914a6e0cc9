"""The demo text encoder: words -> token states and a pooled vector. Runtime module: torch, safetensors and the standard library.

A word-level transformer, trained together with the image model, whose vocabulary travels in the file's metadata. It
knows the words of its training captions and nothing else; a word it does not know is reported and read as <unk>.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

TOKENS = 12  # start token + up to 11 words; longer prompts are cut
PAD, START, UNKNOWN = "<pad>", "<start>", "<unk>"
SPECIAL = [PAD, START, UNKNOWN]
FORMAT = "stretto-demo-text@1"
WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")


def split_words(prompt: str) -> list[str]:
    """Lower-case words of a prompt; hyphens, underscores and punctuation separate words."""
    return WORD.findall(prompt.lower())


class Layer(nn.Module):
    """One pre-norm transformer layer over [B, T, D] with a key mask [B, T]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """x [B, T, D], keep bool [B, T] (False: padding) -> [B, T, D]."""
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None, :])
        x = x + self.out(a.transpose(1, 2).reshape(b, t, d))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class TextEncoder(nn.Module):
    """Word ids -> token states [B, T, 384] and pooled vector [B, 384]; see `load` and `encode`."""

    def __init__(self, vocabulary: list[str], width: int = 192, layers: int = 2, heads: int = 4, out_width: int = 384):
        super().__init__()
        self.vocabulary = list(vocabulary)
        self.index = {word: i for i, word in enumerate(self.vocabulary)}
        self.config = {"width": width, "layers": layers, "heads": heads, "out_width": out_width}
        self.words = nn.Embedding(len(vocabulary), width)
        self.positions = nn.Parameter(torch.zeros(TOKENS, width))
        self.layers = nn.ModuleList([Layer(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.states = nn.Linear(width, out_width)
        self.pooled = nn.Linear(width, out_width)

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids int64 [B, T] -> states [B, T, 384] (zero at padding) and pooled [B, 384]."""
        keep = ids != self.index[PAD]
        x = self.words(ids) + self.positions
        for layer in self.layers:
            x = layer(x, keep)
        x = self.norm(x)
        mask = keep.unsqueeze(-1).to(x.dtype)
        return self.states(x) * mask, self.pooled((x * mask).sum(1) / mask.sum(1))

    def tokenize(self, prompts: list[str]) -> tuple[torch.Tensor, list[str]]:
        """Prompts -> ids int64 [B, T] and the words that are not in the vocabulary, in order, each once."""
        ids = torch.full((len(prompts), TOKENS), self.index[PAD], dtype=torch.long)
        unknown: dict[str, None] = {}
        for row, prompt in enumerate(prompts):
            ids[row, 0] = self.index[START]
            for column, word in enumerate(split_words(prompt)[: TOKENS - 1], start=1):
                ids[row, column] = self.index.get(word, self.index[UNKNOWN])
                if word not in self.index:
                    unknown[word] = None
        return ids, list(unknown)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """Prompts -> (states float32 [B, T, 384], pooled float32 [B, 384], unknown words).

        Deterministic. The empty prompt is the trained unconditional, the negative prompt of guidance.
        """
        ids, unknown = self.tokenize(prompts)
        states, pooled = self(ids.to(self.positions.device))
        return states, pooled, unknown

    @classmethod
    def load(cls, path: str | Path) -> TextEncoder:
        """Read a file written by `save`; raises ValueError when it is another kind of file."""
        from safetensors import safe_open

        with safe_open(str(path), framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{Path(path).name} is no {FORMAT} file (format: {metadata.get('format', 'none')})")
            model = cls(json.loads(metadata["vocabulary"]), **json.loads(metadata["config"]))
            model.load_state_dict({key: file.get_tensor(key).float() for key in file.keys()})
        return model.eval().requires_grad_(False)

    def file_metadata(self) -> dict[str, str]:
        """Metadata that `load` needs: format, configuration and vocabulary as JSON."""
        return {"format": FORMAT, "config": json.dumps(self.config), "vocabulary": json.dumps(self.vocabulary)}


def load(path: str | Path) -> TextEncoder:
    """Shorthand for `TextEncoder.load`."""
    return TextEncoder.load(path)
