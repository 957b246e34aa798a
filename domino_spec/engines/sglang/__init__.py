"""SGLang's plug-in: Domino drafts inside `--speculative-algorithm DFLASH` (paper section 4).

SGLang finds `register` through the entry point group `sglang.srt.plugins` and calls it in every process it starts. To
SGLang a Domino draft is then a DFlash draft with a candidate selector, the seam for drafts that are more than the
argmax of the LM head. The backbone, the caches and the verify pass are SGLang's, the rollout of the head is ours
(`ops.heads`), and what was sampled is accepted with the probability it was drawn with. Nothing else changes, and
drafts of other kinds are served as before.

- `install`: the entrances that are wrapped, what is checked before the engine starts, and what is relied on inside it
- `model`: the draft's weights and the rollout of its head
- `worker`: where both meet SGLang's decoding loop, and the output of the target's last layer
- `cpu`: what SGLang lacks if there is no GPU
"""

from __future__ import annotations

from domino_spec.engines.sglang.install import check_engine, register

__all__ = ["check_engine", "register"]
