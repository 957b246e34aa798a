"""SGLang's plug-in: Domino drafts inside `--speculative-algorithm DFLASH` (paper section 4; DESIGN section 10).

SGLang finds `register` through the entry point group `sglang.srt.plugins` and calls it in every process it starts. To
SGLang a Domino draft is then a DFlash draft with a candidate selector, the seam for drafts that are more than the
argmax of the LM head: the backbone, the caches and the verify pass are SGLang's, the rollout of the head is ours
(`ops.heads`), and what was sampled is accepted with the probability it was drawn with. Nothing else changes, and
drafts of other kinds do not notice.

- `table`: every name of SGLang that is relied on
- `settings`: what is checked and set before the engine starts
- `model`, `proposer`, `worker`: the draft's weights, its rollout, and where the two meet SGLang's decoding loop
- `taps`: the output of the target's last layer, which SGLang does not hand to drafts
- `cpu`: what SGLang lacks where there is no GPU
"""

from __future__ import annotations

from domino_spec.engines.sglang.settings import check_engine
from domino_spec.engines.sglang.start import register

__all__ = ["check_engine", "register"]
