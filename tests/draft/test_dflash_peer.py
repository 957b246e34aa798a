"""An outside peer: transformers' own DFlash assistant, given the same weights, drafts the same tokens.

`MuseGlimmerAssistantModel` is the one DFlash draft that recent transformers releases carry; its `generate` drives it
with `speculation_type="dflash"`.
"""

from __future__ import annotations

import pytest
import torch

from domino_spec.draft.domino import Draft
from domino_spec.drafters.block import BlockDrafter
from tests.tiny import as_target, assert_close, plain_greedy, random_prompts, run, tiny_draft, tiny_model

assistant_module = pytest.importorskip("transformers.models.muse_glimmer_assistant.modeling_muse_glimmer_assistant")
from transformers import DynamicCache  # noqa: E402
from transformers.models.muse_glimmer_assistant import MuseGlimmerAssistantConfig  # noqa: E402


def assistant_of(draft: Draft):
    """transformers' DFlash model with the weights of `draft`."""
    c = draft.config
    config = MuseGlimmerAssistantConfig(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        max_position_embeddings=c.max_position_embeddings,
        layer_types=["full_attention"] * c.num_hidden_layers,
        block_size=c.block_size,
        mask_token_id=c.mask_token_id,
        target_layer_ids=list(c.target_layer_ids),
    )
    model = assistant_module.MuseGlimmerAssistantModel(config).eval()
    renamed = {"fc.": "encoder.fc.", "hidden_norm.": "encoder.output_norm_enc."}
    tensors = {}
    for name, tensor in draft.backbone.state_dict().items():
        for ours, theirs in renamed.items():
            name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
        tensors[name] = tensor
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not [m for m in missing if "inv_freq" not in m]
    assert not [u for u in unexpected if "inv_freq" not in u]
    return model


# transformers norms the last layer's entry of `hidden_states`: a published draft that taps that layer reads it normed.
@pytest.fixture(scope="module", params=[(0, 2), (0, 3), (3, 1)], ids=["inner taps", "last layer", "last layer first"])
def peers(request):
    model = tiny_model()
    target = as_target(model)
    options = dict(taps=request.param, last_tap_normed=3 in request.param)
    draft = tiny_draft(target, head=False, shift_label=False, block_size=6, **options)
    return model, target, draft, assistant_of(draft)


@torch.inference_mode()
def test_hidden_states_equal_those_of_transformers_dflash_model(peers):
    model, target, draft, assistant = peers
    rows, slots = 9, draft.config.block_size
    tokens = torch.tensor(random_prompts([rows]))
    features = target.forward(tokens, target.new_cache(1, rows), draft.config.target_layer_ids).features
    block = draft.block_embeddings(torch.tensor([5]))
    hidden_states = model(tokens, output_hidden_states=True).hidden_states
    theirs = assistant(
        noise_embeds=block,
        context_hidden_states=torch.cat([hidden_states[i + 1] for i in draft.config.target_layer_ids], dim=-1),
        position_ids=torch.arange(rows + slots)[None],
        past_key_values=DynamicCache(),
    ).last_hidden_state
    context = draft.backbone.project_context(draft.read_features(features), torch.arange(rows)[None])
    mask = torch.ones(1, 1, slots, rows + slots, dtype=torch.bool)
    ours = draft.backbone(block, rows + torch.arange(slots)[None], context, mask)
    assert_close(ours, theirs)


def test_transformers_generate_drafts_the_same_tokens_cycle_by_cycle(peers, monkeypatch):
    from transformers.generation.candidate_generator import DFlashTokenCandidateGenerator

    model, target, draft, assistant = peers
    (prompt,) = random_prompts([12], seed=6)
    count = 20
    theirs: list[tuple[int, list[int]]] = []
    original = DFlashTokenCandidateGenerator.get_candidates

    def recording(self, input_ids, *args, **kwargs):
        ids, logits = original(self, input_ids, *args, **kwargs)
        if logits is not None:
            theirs.append((input_ids.shape[1], ids[0, input_ids.shape[1] :].tolist()))
        return ids, logits

    monkeypatch.setattr(DFlashTokenCandidateGenerator, "get_candidates", recording)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        assistant_model=assistant,
        speculation_type="dflash",
        do_sample=False,
        max_new_tokens=count,
    )
    text = plain_greedy(model, prompt, count)
    assert out[0, len(prompt) :].tolist() == text

    ours: dict[int, list[int]] = {}
    drafter = BlockDrafter(draft, use_head=False)

    class Recording:
        feature_layers, max_drafts = drafter.feature_layers, drafter.max_drafts
        samples = False
        allocate, read, advance = map(staticmethod, (drafter.allocate, drafter.read, drafter.advance))

        @staticmethod
        def propose(state, own, num_drafts):
            proposal = drafter.propose(state, own, num_drafts)
            ours[int(state.lengths[0])] = proposal.tokens[0].tolist()
            return proposal

    (generation,) = run(target, Recording, [prompt], count)
    assert generation.token_ids == text
    # transformers spends its first pass without a draft, so only cycles at the same place can be compared; drafts that
    # are never accepted, as these random ones, meet at every place.
    common = [(length, drafts) for length, drafts in theirs if length in ours]
    assert len(common) >= 5
    for length, drafts in common:
        assert ours[length] == drafts


@torch.inference_mode()
def test_the_side_of_the_norm_matters(peers):
    """A test that could not fail would say nothing: read on the other side, the context is another."""
    _, target, draft, _ = peers
    features = target.forward(torch.tensor(random_prompts([9])), target.new_cache(1, 9), draft.config.target_layer_ids)
    same = torch.allclose(draft.read_features(features.features), features.features, atol=0.1)
    assert same == (not draft.config.last_tap_normed)
