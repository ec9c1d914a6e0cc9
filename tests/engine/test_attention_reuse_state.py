"""The state machine across steps, on a model of three attentions, over what samplers and users do to it."""

import numpy as np
import pytest
import torch

from stretto.acceleration.attention.builders import Selection
from stretto.acceleration.attention.reuse import (
    AS_COMPUTED,
    POLICIES,
    AttentionMemory,
    Mode,
    ModeTable,
    Shape,
    announce,
    choose_policy,
    ditfastattn,
    re_ttention,
    uniform,
    with_refreshes,
)
from stretto.acceleration.errors import StrettoError
from stretto.acceleration.evaluation import Branch
from stretto.kernels.block_sparse_attention import BlockList, reference

LAYERS, HEADS, SIZE, BLOCK = 3, 2, 8, 16
COND, UNCOND = Branch("cond", "prompt"), Branch("uncond", "empty")
F, L, S, W, R, M, Z = Mode.FULL, Mode.LIST, Mode.SHARE, Mode.RESIDUAL, Mode.RHO, Mode.MEAN, Mode.ZERO
LETTERS = {int(F): "F", int(L): "L", int(S): "S", int(W): "W", int(R): "R", int(M): "M", int(Z): "Z"}


class Model:
    """Three attentions; queries, keys and values follow from the latent, the layer and the prompt."""

    def __init__(self, memory, tokens=70, rows=1, dtype=torch.float32):
        self.memory, self.tokens, self.rows, self.dtype, self.log = memory, tokens, rows, dtype, []

    def inputs(self, layer, branch, drift=0.0):
        made = []
        for part in range(3):
            seed = 100 * layer + 10 * part + (branch.key == "empty")
            random = torch.Generator().manual_seed(seed)
            base = torch.randn(self.rows, HEADS, self.tokens, SIZE, generator=random)
            made.append((base + drift * torch.randn(base.shape, generator=random)).to(self.dtype))
        return made

    def lists(self, count):
        blocks = -(-self.tokens // BLOCK)
        mask = torch.rand(1, HEADS, blocks, blocks, generator=torch.Generator().manual_seed(3)) < 0.3
        return Selection((mask | torch.eye(blocks, dtype=torch.bool)).expand(count, -1, -1, -1))

    def call(self, *branches, drift=0.0):
        """One network call; returns outputs by layer, and logs what the first head of every layer did."""
        outs, words = [], []
        for layer in range(LAYERS):
            q, k, v = (torch.cat(x) for x in zip(*(self.inputs(layer, b, drift) for b in branches)))
            decision = self.memory.decide(layer, branches, q.shape, q)
            if decision.plain:
                every = BlockList.from_mask(torch.ones_like(self.lists(1).mask[:, :1]), BLOCK, BLOCK)
                outs.append(reference.block_sparse_attention(q, k, v, every)[0])
                words.append("." * len(branches))
                continue
            outs.append(self.memory.compute(decision, q, k, v, lambda q=q: self.lists(len(q)), (BLOCK, BLOCK)))
            words.append("".join("D" if d[0] else LETTERS[int(m[0])] for m, d in zip(decision.modes, decision.donated)))
        assert len(set(words)) == 1  # layers agree where the table treats them alike
        self.log.append(words[0])
        return outs

    def evaluate(self, sigma, step, *calls, drift=0.0):
        self.memory.begin(sigma, step)
        return [self.call(*branches, drift=drift) for branches in calls]


def model(*by_step, cfg=(), tokens=70, dtype=torch.float32, **settings):
    table = uniform(len(by_step), LAYERS, HEADS, by_step, cfg)
    return Model(AttentionMemory(table, **settings), tokens, dtype=dtype)


def sigma_of(step, steps=10):
    return 1 - step / steps


def test_euler_follows_the_table():
    run = model(F, R, R, F, W, S, S, L, Z, F)
    for step in range(10):
        run.evaluate(sigma_of(step), step, (COND, UNCOND))
    # The last full step leaves nothing to anyone: the network's own attention computes it.
    assert run.log == ["FF", "RR", "RR", "FF", "WW", "SS", "SS", "LL", "ZZ", ".."]
    assert run.memory.bytes == 0 and run.memory.peak_bytes > 0
    assert np.array_equal(run.memory.grid(), run.memory.table.modes)


def test_heun_repeats_the_phase_and_ages_once():
    run = model(F, R, R, S, F, rho_step=0.04)
    ages = []
    for step, sigma in ((0, 1.0), (1, 0.9), (1, 0.9), (2, 0.8), (2, 0.8), (3, 0.7), (3, 0.7), (4, 0.6)):
        run.evaluate(sigma, step, (COND,))
        ages.append([group.age for entry in run.memory._entries.values() for group in entry.held][:1])
    assert run.log == ["F", "R", "R", "R", "R", "S", "S", "."]
    assert ages[:3] == [[0], [1], [1]] and all(age in ([2], []) for age in ages[3:])


def test_a_full_step_that_is_evaluated_twice_is_made_anew():
    run = model(F, R)
    run.evaluate(1.0, 0, (COND,))
    run.evaluate(1.0, 0, (COND,), drift=0.2)
    out = run.evaluate(0.9, 1, (COND,), drift=0.2)[0]
    q, k, v = run.inputs(0, COND, 0.2)
    every = BlockList.from_mask(torch.ones(1, 1, 5, 5, dtype=torch.bool), BLOCK, BLOCK)
    assert torch.allclose(out[0], reference.block_sparse_attention(q, k, v, every)[0], atol=1e-6)
    assert run.log == ["F", "F", "R"]


@pytest.mark.parametrize("start", [1, 4, 5])
def test_image_to_image_starts_in_full(start):
    run = model(F, R, R, F, W, S, R)
    run.evaluate(sigma_of(start), start, (COND,))
    assert run.log == ["F"]
    run.evaluate(sigma_of(6), 6, (COND,))
    assert run.log[1] in "FR."


def test_a_restart_forgets():
    run = model(F, R, R, R)
    for step in (0, 1, 2):
        run.evaluate(sigma_of(step), step, (COND,))
    run.evaluate(sigma_of(1), 1, (COND,))  # noise was added back
    run.evaluate(sigma_of(2), 2, (COND,))
    assert run.log == ["F", "R", "R", "F", "R"]


def test_a_branch_that_appears_later_starts_in_full():
    run = model(F, R, R, R)
    run.evaluate(1.0, 0, (COND,))
    run.evaluate(0.9, 1, (COND, UNCOND))
    run.evaluate(0.8, 2, (COND, UNCOND))
    run.evaluate(0.7, 3, (UNCOND, COND))
    assert run.log == ["F", "RF", "RR", "RR"]


def test_merged_and_split_batches_are_the_same_to_the_bit():
    for by_step, cfg in (((F, R, R, S, W), ()), ((F, W, F, R, S), (0, 1, 1, 1, 1))):
        by_step = [F if i and m == W and by_step[i - 1] == S else m for i, m in enumerate(by_step)]
        runs = [model(*by_step, cfg=cfg) for _ in range(3)]
        for step in range(5):
            drift = 0.05 * step
            (merged,) = runs[0].evaluate(sigma_of(step), step, (COND, UNCOND), drift=drift)
            split = runs[1].evaluate(sigma_of(step), step, (COND,), (UNCOND,), drift=drift)
            (turned,) = runs[2].evaluate(sigma_of(step), step, (UNCOND, COND), drift=drift)
            for layer in range(LAYERS):
                assert torch.equal(merged[layer], torch.cat([split[0][layer], split[1][layer]]))
                assert torch.equal(merged[layer], turned[layer].flip(0))


def test_guidance_branches_share_whichever_comes_first():
    run = model(F, F, cfg=(False, True))
    run.evaluate(1.0, 0, (COND,), (UNCOND,))
    first, second = run.evaluate(0.9, 1, (UNCOND,), (COND,))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert run.log == [".", ".", "F", "D"]
    run.memory.begin(0.8, 2)
    assert run.memory.bytes == 0  # what was lent lasts as long as an evaluation


def test_a_full_step_that_leaves_a_branch_something_of_its_own_is_not_shared():
    run = model(F, R, F, R, cfg=(True, False, True, True))
    for step in range(4):
        run.evaluate(sigma_of(step), step, (COND, UNCOND))
    assert run.log == ["FF", "RR", "FD", "RD"]


def test_alone_a_branch_shares_with_nobody():
    run = model(F, W, cfg=(True, True), branches=1)
    plain = model(F, W, branches=1)
    for step in range(2):
        a, b = (r.evaluate(sigma_of(step), step, (COND,))[0] for r in (run, plain))
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert run.log == ["F", "W"]


def test_prompts_by_area_do_not_share():
    other = Branch("cond", "second prompt")
    run = model(L, L, cfg=(True, True))
    run.evaluate(1.0, 0, (COND, other, UNCOND))
    run.evaluate(0.9, 1, (COND,), (other,), (UNCOND,))
    assert run.log == ["LLL", "L", "L", "L"]
    run = model(L, cfg=(True,))
    run.evaluate(1.0, 0, (Branch("other", 1), COND, UNCOND))
    assert run.log == ["LLD"]


def test_another_prompt_starts_in_full_and_the_old_one_is_forgotten():
    run = model(F, *[R] * 9)
    run.evaluate(1.0, 0, (COND,))
    run.evaluate(0.9, 1, (Branch("cond", "another"),))
    held = run.memory.bytes
    for step in range(2, 8):
        run.evaluate(sigma_of(step), step, (Branch("cond", "another"),))
    assert run.log[:3] == ["F", "F", "R"] and run.memory.bytes == held // 2


@pytest.mark.parametrize("change", [{"tokens": 90}, {"rows": 2}, {"dtype": torch.bfloat16}])
def test_another_shape_starts_in_full(change):
    run = model(F, R, R, R)
    run.evaluate(1.0, 0, (COND,))
    for name, value in change.items():
        setattr(run, name, value)
    run.evaluate(0.9, 1, (COND,))
    run.evaluate(0.8, 2, (COND,))
    assert run.log == ["F", "F", "R"]


def test_an_interrupted_run_leaves_nothing():
    run = model(F, R, R, R)
    run.evaluate(1.0, 0, (COND, UNCOND))
    run.memory.begin(0.9, 1)
    q = run.inputs(0, COND)[0]
    run.memory.decide(0, [COND], q.shape, q)  # and the user presses stop
    run.memory.close()
    assert run.memory.bytes == 0 and not run.memory._entries and not run.memory._donations
    again = Model(AttentionMemory(run.memory.table))
    again.evaluate(0.9, 1, (COND,))
    assert again.log == ["F"]


def test_steps_that_a_cache_skips_do_not_age():
    run = model(F, R, R, R, R, rho_step=0.04)
    run.evaluate(1.0, 0, (COND,))
    run.memory.begin(0.9, 1)  # skipped: no attention comes by
    run.memory.begin(0.8, 2)
    run.evaluate(0.7, 3, (COND,))
    assert run.log == ["F", "R"]
    assert [group.age for entry in run.memory._entries.values() for group in entry.held] == [1, 1, 1]


def test_a_full_step_that_a_cache_skips_is_made_up_for():
    run = model(F, R, F, R, R)
    run.evaluate(1.0, 0, (COND,))
    run.evaluate(0.9, 1, (COND,))
    run.memory.begin(0.8, 2)
    run.evaluate(0.7, 3, (COND,))
    run.evaluate(0.6, 4, (COND,))
    assert run.log == ["F", "R", "F", "R"]


def test_sharing_needs_an_output_in_a_plan_and_computes_one_in_a_run():
    table = uniform(2, LAYERS, HEADS, [S, F])
    with pytest.raises(StrettoError, match="step 0, layer 0, head 0 is share"):
        table.check()
    run = Model(AttentionMemory(table))
    run.evaluate(1.0, 0, (COND,))
    assert run.log == ["."] and run.memory.bytes == 0


@pytest.mark.parametrize(
    "by_step, word",
    [((L, R), "full step"), ((F, Z, S), "share"), ((F, R, W), "another correction"), ((M,), "full step")],
)
def test_tables_that_cannot_be_followed_are_refused(by_step, word):
    with pytest.raises(StrettoError, match=word):
        uniform(len(by_step), LAYERS, HEADS, by_step).check()


def test_hand_schedules_can_be_followed():
    for steps in (1, 4, 12, 20, 30, 50):
        for table in (ditfastattn(steps, 2, 3), re_ttention(steps, 2, 3), re_ttention(steps, 2, 3, mode=Mode.MEAN)):
            table.check()
            assert (table.modes[0] == int(F)).all()
    by_step = re_ttention(20, 1, 1).modes[:, 0, 0]
    assert (by_step[:5] == int(F)).all() and list(np.flatnonzero(by_step[5:] == int(F))) == [4, 9, 14]


def test_refreshes_are_put_where_they_are_due():
    wanted = np.full((9, 1, 1), int(R), np.uint8)
    found = with_refreshes(wanted, [4] * 9)[:, 0, 0]
    assert "".join(LETTERS[int(mode)] for mode in found) == "FRRRFRRRF"
    wanted[4:] = int(S)
    assert "".join(LETTERS[int(mode)] for mode in with_refreshes(wanted, [0] * 9)[:, 0, 0]) == "FRRRSSSSS"


def random_table(seed, steps=12):
    random = np.random.default_rng(seed)
    wanted = random.choice([0, 1, 2, 3, 4, 5, 6], (steps, LAYERS, HEADS)).astype(np.uint8)
    return ModeTable(with_refreshes(wanted, [4] * steps), random.random((steps, LAYERS, HEADS)) < 0.3)


def wander(memory, seed, tokens=70):
    """Run as samplers, caches and users may make it: repeats, skips, split batches, branches that come and go."""
    random = np.random.default_rng(seed)
    run, peak = Model(memory, tokens), 0
    for step in range(memory.table.steps):
        for _ in range(random.integers(1, 3)):
            memory.begin(sigma_of(step, 20), step)
            if random.random() < 0.2:
                continue
            calls = [[(COND, UNCOND)], [(COND,), (UNCOND,)], [(UNCOND,), (COND,)], [(COND,)]][random.integers(4)]
            for branches in calls:
                for layer in range(LAYERS):
                    q, k, v = (torch.cat(x) for x in zip(*(run.inputs(layer, b) for b in branches)))
                    decision = memory.decide(layer, branches, q.shape, q)
                    if not decision.plain:
                        out = memory.compute(decision, q, k, v, lambda q=q: run.lists(len(q)), (BLOCK, BLOCK))
                        assert torch.isfinite(out).all()
                    peak = max(peak, memory.bytes)
    return peak


@pytest.mark.parametrize("policy", list(POLICIES))
@pytest.mark.parametrize("seed", range(4))
def test_bytes_never_exceed_what_was_announced(seed, policy):
    table = random_table(seed)
    table.check()
    said = announce(table, Shape(1, 70, SIZE, 4, (5, 5)), POLICIES[policy])
    memory = AttentionMemory(table, policy=POLICIES[policy])
    peak = wander(memory, seed)
    assert 0 < peak <= memory.peak_bytes <= said.bytes and memory.peak_system_bytes <= said.system_bytes
    assert memory.peak_bytes > 0.3 * said.bytes  # an announcement that says too much is no use either


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2, 0.02])
def test_a_budget_holds_whatever_happens(share):
    table = random_table(7)
    need = announce(table, Shape(1, 70, SIZE, 4, (5, 5))).bytes
    memory = AttentionMemory(table, budget_bytes=int(need * share))
    assert wander(memory, 7) <= need * share and memory.peak_bytes <= need * share


def test_policies_are_tried_from_the_harmless_to_the_costly():
    table, shape = re_ttention(20, 4, 4), Shape(1, 1024, 64, 2, (16, 16))
    need = {name: announce(table, shape, policy).bytes for name, policy in POLICIES.items()}
    assert choose_policy(table, shape, need["as computed"]).policy is AS_COMPUTED
    assert choose_policy(table, shape, need["as computed"] - 1).policy.name == "eighth"
    assert choose_policy(table, shape, need["eighth"] - 1).policy.name == "system memory"
    capped = choose_policy(table, shape, 1000)
    assert capped.bytes == 1000 and capped.policy.in_system_memory
    assert need["eighth"] < 0.6 * need["as computed"]


@pytest.mark.parametrize(
    "tokens, heads, megabytes, eighth", [(75_600, 40, 774, 399), (16_896, 24, 104, 54)], ids=["Wan 14B 720p", "FLUX 2K"]
)
def test_residuals_of_known_models(tokens, heads, megabytes, eighth):
    """Megabytes of one layer and branch: 2 bytes a number as computed, 1 and a scale per token and head in eight bits."""
    table, shape = uniform(2, 1, heads, [F, W]), Shape(1, tokens, 128, 2, (1, 1), branches=1, static=True)
    assert announce(table, shape).bytes / 1e6 == pytest.approx(megabytes, abs=1)
    assert announce(table, shape, POLICIES["eighth"]).bytes / 1e6 == pytest.approx(eighth, abs=1)
    with_rho = uniform(2, 1, heads, [F, M])
    assert announce(with_rho, shape).bytes == tokens * heads * 4


def test_where_memory_is_short_the_residuals_that_matter_least_go_first():
    table = uniform(2, 2, 2, [F, R])
    need = announce(table, Shape(1, 70, SIZE, 4, (5, 5), branches=1)).bytes
    memory = AttentionMemory(table, branches=1, budget_bytes=need - 1)
    memory.begin(1.0, 0)
    run = Model(memory)
    blocks = torch.eye(5, dtype=torch.bool).expand(1, 2, -1, -1)
    # The lists of layer 0 leave most of the attention out, those of layer 1 a single block.
    chosen = [Selection(blocks), Selection(~blocks)]
    for step, sigma in ((0, 1.0), (1, 0.9)):
        memory.begin(sigma, step)
        for layer in range(2):
            q, k, v = run.inputs(layer, COND)
            decision = memory.decide(layer, [COND], q.shape, q)
            memory.compute(decision, q, k, v, lambda layer=layer: chosen[layer], (BLOCK, BLOCK))
            if step:
                assert {LETTERS[int(mode)] for mode in decision.modes[0]} == {"RM"[layer]}
    assert memory.peak_bytes <= need - 1


def test_a_table_for_another_network_is_a_programming_error():
    memory = AttentionMemory(uniform(2, 1, 2, [F, R]))
    memory.begin(1.0, 0)
    with pytest.raises(ValueError, match="1 layers of 2 heads"):
        memory.decide(1, [COND], (1, 2, 70, 8), torch.zeros(1))
