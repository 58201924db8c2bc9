"""2 OLMo 2 Furious (arXiv 2501.00656).

Llama with its norms elsewhere: none before attention and MLP, one on what each of them adds to the residual stream, and
one on all queries and one on all keys of a token together, across heads. So

- q, k, v, gate and up read the residual stream itself, and their inputs cannot be scaled; those of o and down can;
- the residual stream cannot be rotated: the weights of the norms on what is added to it commute with no rotation, and
  no linear comes between them and the stream that could take them;
- removing key/value groups also takes their channels out of the norms on queries and keys. The root mean square is then
  that of the channels that stay, so a removal changes the outputs of the groups that stay too.

transformers 5.23 does not read it from GGUF.
"""

from __future__ import annotations

from coppice.models.architectures import llama
from coppice.models.architectures.base import Norms, QueryKeyNorms, resembling

ARCHITECTURE = resembling(
    llama.ARCHITECTURE,
    model_type="olmo2",
    class_prefix="Olmo2",
    norms=Norms(
        after_attention="post_attention_layernorm",
        after_mlp="post_feedforward_layernorm",
        across_heads=QueryKeyNorms("self_attn.q_norm", "self_attn.k_norm"),
    ),
)
