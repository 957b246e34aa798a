"""The SGLang plug-in without a server: what it refuses and settles before one starts, and its functions."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace

import pytest
import torch

from tests.engines import sglang_engine  # noqa: F401, before SGLang: it says where stand-ins for kernels are

pytest.importorskip("sglang")

from sglang.srt.arg_groups.overrides import resolving_view
from sglang.srt.layers.sampler import top_k_top_p_min_p_sampling_from_probs_torch
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang.srt.server_args import prepare_server_args
from sglang.srt.speculative.dflash_utils import parse_dflash_draft_config
from sglang.srt.speculative.dflash_worker_v2 import DFlashWorkerV2
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from domino_spec.draft.checkpoint import draft_tensors, save_draft
from domino_spec.engines.drafting import ALLOW_OTHER_TARGET
from domino_spec.engines.sglang import cpu, install
from domino_spec.engines.sglang.model import Proposer, check_names
from domino_spec.engines.sglang.worker import DominoWorker, GraphSampler, draft_temperatures, tap_last_layer
from domino_spec.ops.heads import HeadInputs, head_rollout
from domino_spec.settings import UserError
from tests import tiny
from tests.engines.sglang_engine import save_tiny_pair


@pytest.fixture(scope="module", autouse=True)
def plugins():
    load_plugins()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return save_tiny_pair(tmp_path_factory.mktemp("pair"), draft_vocab_ids=torch.arange(0, tiny.VOCAB, 2), prefix=2)


def arguments(target, draft, *options, backend="torch_native"):
    line = ["--model-path", str(target), "--device", "cpu", "--dtype", "float32", "--attention-backend", backend]
    line += ["--skip-tokenizer-init", "--speculative-algorithm", "DFLASH"]
    return prepare_server_args([*line, "--speculative-draft-model-path", str(draft), *options])


def resolved(*given, **options):
    server_args = arguments(*given, **options)
    server_args.resolve_once()
    return server_args


def test_settings_left_open_are_those_of_the_draft(pair):
    server_args = resolved(*pair[:2])
    view = resolving_view(server_args)
    assert view.speculative_num_draft_tokens == 5
    assert view.speculative_domino_candidate_pool_size == 0
    assert view.speculative_draft_attention_backend == "torch_native"
    assert SpeculativeAlgorithm.DFLASH.create_worker(server_args) is DominoWorker


def test_candidates_that_were_asked_for_are_kept(pair):
    view = resolving_view(resolved(*pair[:2], "--speculative-domino-candidate-pool-size", "16"))
    assert view.speculative_domino_candidate_pool_size == 16


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--speculative-num-draft-tokens", "4"], "--speculative-num-draft-tokens 4: .* trained with 5; leave"),
        (["--speculative-dflash-block-size", "8"], "--speculative-dflash-block-size 8: .* trained with 5; leave"),
        (["--speculative-domino-candidate-pool-size", "-1"], "must be 0, for every token, or the number"),
    ],
)
def test_options_that_cannot_be_served_are_refused_by_name(pair, options, sentence):
    with pytest.raises(UserError, match=sentence):
        resolved(*pair[:2], *options)


def test_a_backend_that_cannot_verify_on_cpu_is_refused():
    asked = SimpleNamespace(device="cpu", attention_backend="intel_amx")
    with pytest.raises(UserError, match=r"--attention-backend intel_amx: .* needs torch_native"), cpu.admitted(asked):
        pass


def test_attention_in_data_parallel_is_refused(pair):
    config = pair[2].config
    asked = SimpleNamespace(
        speculative_num_draft_tokens=None,
        speculative_dflash_block_size=None,
        speculative_domino_candidate_pool_size=2048,
        attn_dp_size=2,
    )
    with pytest.raises(UserError, match="--attn-dp-size 2: attention in data parallel"):
        install.check_settings(asked, config)


def test_a_target_of_another_shape_is_refused(pair, tmp_path):
    tiny.tiny_model(hidden_size=64).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"does not fit target .* hidden size 32, the target has 64"):
        resolved(tmp_path, pair[1])


def test_a_target_of_other_weights_is_refused_unless_allowed(pair, tmp_path, monkeypatch):
    tiny.tiny_model(seed=5).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"fingerprint .* \(DOMINO_SPEC_ALLOW_OTHER_TARGET=1 in the environment\)"):
        resolved(tmp_path, pair[1])
    monkeypatch.setenv(ALLOW_OTHER_TARGET, "1")
    assert resolving_view(resolved(tmp_path, pair[1])).speculative_num_draft_tokens == 5


def test_an_unsupported_setting_of_the_draft_is_refused_by_name(pair, tmp_path):
    config = json.loads((pair[1] / "config.json").read_text()) | {"hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"hidden_act: expected .*'gelu'"):
        resolved(pair[0], tmp_path)


def test_a_hook_that_moved_stops_the_engine(pair, monkeypatch):
    def elsewhere(self, *, draft_logits_output, bs, lm_head, anchors):
        raise AssertionError

    monkeypatch.setattr(DFlashWorkerV2, "_propose_selector_block", elsewhere)
    with pytest.raises(UserError, match=r"SGLang 0\.5\.23 is not as .*_propose_selector_block takes \(self, draft_l"):
        resolved(*pair[:2])


def test_another_release_is_refused(monkeypatch):
    monkeypatch.setattr(install, "version", lambda name: "0.6.0")
    with pytest.raises(UserError, match=r"SGLang 0\.6\.0 is not supported: .* SGLang 0\.5\.23"):
        install.check_engine()


def test_an_unknown_release_ends_the_process_that_asks_for_a_domino_draft(pair, monkeypatch):
    monkeypatch.setattr(install, "version", lambda name: "0.6.0")
    register = install.register.__wrapped__
    with pytest.raises(UserError, match=r"SGLang 0\.6\.0 is not supported"):
        register()
    for option in (["--speculative-draft-model-path", str(pair[1])], [f"--speculative-draft-model-path={pair[1]}"]):
        monkeypatch.setattr("sys.argv", ["launch_server", *option])
        with pytest.raises(SystemExit, match=r"domino-spec: SGLang 0\.6\.0 is not supported"):
            register()


def test_every_entrance_is_wrapped_once():
    install.register()
    wrapped = [install.HANDLE_DFLASH, install.PARSE_CONFIG, install.CREATE_WORKER, install.DRAFT_MODEL_CONFIG]
    assert [len(HookRegistry._hooks[path.replace(":", ".")]) for path in wrapped] == [1] * 4


def test_other_drafts_do_not_notice(pair, tmp_path):
    draft = tiny.tiny_draft(pair[3], head=False)
    save_draft(draft, tmp_path)
    published = SimpleNamespace(**json.loads((tmp_path / "config.json").read_text()))
    assert install.without_head(published) is published
    assert not install.is_domino(published)
    server_args = SimpleNamespace(
        speculative_draft_model_path=None, _raw_input=None, device="cpu", json_model_override_args="{}"
    )
    assert install.served_draft(server_args) is None
    assert install.choose_worker(lambda *given: "theirs", SpeculativeAlgorithm.EAGLE, server_args) == "theirs"


def test_sglang_reads_a_domino_draft_as_its_backbone(pair):
    published = json.loads((pair[1] / "config.json").read_text())
    parsed = parse_dflash_draft_config(draft_hf_config=published)
    assert (parsed.block_size, parsed.mask_token_id, parsed.target_layer_ids) == (5, tiny.MASK, [0, 3])
    assert not parsed.is_domino


def test_weights_that_are_missing_or_unexpected_are_refused(pair):
    draft = pair[2]
    names = set(draft_tensors(draft))
    check_names(names, draft.config)
    with pytest.raises(UserError, match=r"embed_proj\.2.weight is missing"):
        check_names(names - {"embed_proj.2.weight"}, draft.config)
    with pytest.raises(UserError, match="unexpected tensor other"):
        check_names(names | {"other"}, draft.config)


class Group:
    """Ranks that share a vocabulary, seen from the first."""

    def __init__(self, world_size=1, others=None):
        self.world_size, self.others = world_size, others

    def all_gather(self, logits, dim):
        return torch.cat((logits, self.others(logits)), dim=dim)


@pytest.fixture
def proposer(pair):
    return bound(pair, Group())


def bound(pair, group, rows=slice(None), candidates=0):
    draft, target = pair[2], pair[3]
    made = Proposer(draft.config)
    made.head.load_state_dict(draft.head.state_dict())
    if draft.draft_vocab_ids is not None:
        made.draft_vocab_ids.copy_(draft.draft_vocab_ids)
    head = SimpleNamespace(weight=target.lm_head_weight[rows])
    made.bind(target.embedding, head, group, 1.0, candidates)
    return made


def blocks(pair, requests=3):
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(requests, 5, pair[2].config.hidden_size, generator=generator)
    return hidden, torch.randint(0, tiny.VOCAB, (requests,), generator=generator)


def reference(pair, hidden, anchors):
    draft = pair[2]
    slots = hidden[:, draft.config.first_draft_slot :][:, :4]
    rollout = head_rollout(draft.head_weights, HeadInputs(slots, draft.base_logits(slots), draft.embed(anchors)))
    return draft.to_token_ids(rollout.choices)


def test_greedy_drafts_are_those_of_the_reference_rollout(pair, proposer):
    hidden, anchors = blocks(pair)
    drafts = proposer(hidden, anchors)
    assert drafts.tokens.tolist() == reference(pair, hidden, anchors).tolist()
    assert drafts.probs is None


def test_a_vocabulary_cut_among_ranks_drafts_the_same(pair):
    hidden, anchors = blocks(pair)
    weight, half = pair[3].lm_head_weight, 32  # the second rank holds 28 rows and 4 of padding
    slots = hidden[:, :4].flatten(0, 1)

    def others(logits):
        return torch.nn.functional.pad(slots @ weight[half:].T, (0, 4), value=1e9)

    cut = bound(pair, Group(2, others), slice(0, half))
    assert cut(hidden, anchors).tokens.tolist() == reference(pair, hidden, anchors).tolist()


def test_sampled_drafts_say_what_they_were_drawn_from(pair, proposer):
    hidden, anchors = blocks(pair)
    drafts = proposer(hidden, anchors, torch.tensor([0.0, 1.0, 2.0]))
    assert drafts.probs.sum(-1).allclose(torch.ones(3, 4))
    assert drafts.probs[0].amax(-1).tolist() == [1.0] * 4
    assert drafts.tokens[0].tolist() == reference(pair, hidden, anchors)[0].tolist()
    drawn = ((drafts.candidate_ids == drafts.tokens[..., None]) * drafts.probs).sum(-1)
    assert (drawn > 0).all()
    assert set(drafts.candidate_ids.unique().tolist()) <= set(range(0, tiny.VOCAB, 2))


def test_the_graph_sampler_drafts_what_the_eager_one_does(pair, proposer):
    hidden, anchors = blocks(pair)
    ids = torch.full((3, 5), tiny.MASK)
    ids[:, 0] = anchors
    sampler = GraphSampler(proposer, 4, torch.float32, torch.device("cpu"))
    sampler(hidden.view(15, -1), ids.flatten())
    sampler.stage_sampling_params(bs=3, sampling_info=None)
    assert sampler.out[:12].view(3, 4).tolist() == reference(pair, hidden, anchors).tolist()
    info = sampling(temperatures=[1.0, 1.0, 1.0], top_ks=[1, 9, 9])
    sampler.stage_sampling_params(bs=3, sampling_info=info)
    tokens = sampler.out[:12].view(3, 4)
    assert tokens[0].tolist() == reference(pair, hidden, anchors)[0].tolist()
    drawn = ((sampler.candidate_out == tokens[..., None]) * sampler.q_out).sum(-1)
    assert (drawn > 0).all() and drawn[0].tolist() == [1.0] * 4


def sampling(temperatures, top_ks, top_ps=None, min_ps=None, greedy=False):
    ones = [1.0] * len(temperatures)
    return SimpleNamespace(
        temperatures=torch.tensor(temperatures)[:, None],
        top_ks=torch.tensor(top_ks),
        top_ps=torch.tensor(top_ps or ones),
        min_ps=torch.tensor(min_ps or [0.0] * len(ones)),
        need_min_p_sampling=min_ps is not None,
        is_all_greedy=greedy,
    )


def test_requests_that_choose_have_temperature_zero():
    mixed = draft_temperatures(2, sampling([0.7, 1.0], [50, 1]))
    assert mixed is not None and mixed.tolist() == pytest.approx([0.7, 0.0])
    assert draft_temperatures(2, sampling([1.0, 1.0], [1, 1], greedy=True)) is None


def test_the_distribution_on_cpu_is_what_sglang_samples_from():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)) * 3
    info = sampling([0.8, 1.3], [7, 1 << 30], [0.9, 0.8], [0.05, 0.02])
    ours = cpu.target_distribution(logits, info, rows=3)
    by_row = {name: getattr(info, name).view(-1).repeat_interleave(3) for name in ("top_ks", "top_ps", "min_ps")}
    probs = (logits / info.temperatures.view(-1).repeat_interleave(3)[:, None]).softmax(-1)
    filtered = top_k_top_p_min_p_sampling_from_probs_torch(
        probs, **by_row, need_min_p_sampling=True, sampling_seed=None, positions=None, return_filtered_probs=True
    )
    weights, ids = filtered[1], filtered[2]
    theirs = torch.zeros_like(ours).scatter_(1, ids.long(), weights / weights.sum(-1, keepdim=True))
    torch.testing.assert_close(ours, theirs)


def test_a_target_whose_last_layer_is_hidden_is_refused(pair):
    with pytest.raises(UserError, match="reads the target's last layer, which SGLang's SimpleNamespace does not show"):
        tap_last_layer(SimpleNamespace(model=None), pair[2].config)


def test_the_table_covers_every_method_that_is_overridden():
    named = {hook.path.rpartition(".")[2] for hook in install.HOOKS["0.5.23"]}
    overridden = {name for name, value in vars(DominoWorker).items() if inspect.isfunction(value)} - {"__init__"}
    assert overridden <= named
