"""Many adapters, each at its own step and rate, are what torch's AdamW makes of each."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from raymerge.models.stacked import Rows
from raymerge.models.training.optimiser import clip, update

RATES = st.sampled_from([0.0, 1e-3, 1e-2, 0.3])


@given(st.lists(st.lists(RATES, min_size=1, max_size=5), min_size=1, max_size=5), st.sampled_from([0.0, 0.1]))
def test_each_slot_is_an_optimiser_of_its_own(schedules: list[list[float]], decay: float) -> None:
    """Slots begin one after the other, so that their steps differ."""
    generator = torch.Generator().manual_seed(len(schedules))
    rows = Rows(len(schedules), 37, torch.device("cpu"), torch.bfloat16)
    rows.factors.copy_(torch.randn(rows.factors.shape, generator=generator))
    alone = [row.clone().requires_grad_() for row in rows.factors]
    optimisers = [torch.optim.AdamW([row], weight_decay=decay, foreach=False) for row in alone]
    for step in range(5):
        gradients = torch.randn(rows.factors.shape, generator=generator) * 10.0 ** (step - 2)
        rows.gradients.copy_(gradients)
        begun = [min(slot, 2) for slot in range(len(schedules))]
        for slot, start in enumerate(begun):
            if step == start:  # a new adapter in the slot
                rows.first[slot].zero_()
                rows.second[slot].zero_()
                with torch.no_grad():
                    alone[slot].copy_(rows.factors[slot])
        rates = [own[step % len(own)] for own in schedules]
        clip([rows], 0.5)
        update([rows], [max(0, step - start) for start in begun], rates, decay)
        for slot, start in enumerate(begun):
            if step < start:
                continue
            alone[slot].grad = gradients[slot].clone()
            torch.nn.utils.clip_grad_norm_([alone[slot]], 0.5)
            optimisers[slot].param_groups[0]["lr"] = rates[slot]
            optimisers[slot].step()
            torch.testing.assert_close(rows.factors[slot], alone[slot].detach(), rtol=1e-5, atol=1e-6)
        assert not rows.gradients.any()
        assert torch.equal(rows.cast, rows.factors.bfloat16())


def test_a_norm_is_taken_over_all_devices_rows() -> None:
    parts = [Rows(2, length, torch.device("cpu"), torch.float32) for length in (3, 5)]
    for part in parts:
        part.gradients[0], part.gradients[1] = 2.0, 0.01
    clip(parts, 1.0)
    norms = torch.cat([part.gradients for part in parts], dim=1).norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([1.0, 0.01 * 8**0.5]), rtol=1e-4, atol=0)
