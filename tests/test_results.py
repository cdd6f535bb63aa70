import torch

from hf_equiv.results import MatchResult, Status


def test_result_is_one_line():
    status = (Status.CONVERGED, Status.STALLED, Status.CONVERGED)
    errors = torch.tensor([2e-6, 0.5, 9e-6], dtype=torch.float64)
    result = MatchResult(torch.zeros(3, 3, 8, 9), errors, torch.tensor([10.3, 7, 5]), torch.ones(3), status, ((),) * 3)
    assert repr(result) == "MatchResult(3 of 3×8×9: 2 converged, 1 stalled; errors 2.0e-06 to 5.0e-01; 22 evaluations)"
