"""The next-token shift: which tokens count, and where they are predicted."""

import torch

from worker.tokens import counted


def test_a_prompt_of_three_and_an_answer_of_three() -> None:
    """Positions 0 1 2 are the prompt, 3 4 5 the answer; the answer is predicted at 2 3 4 (defect P1 of the reference code)."""
    ids_BT = torch.tensor([[10, 11, 12, 13, 14, 15]])
    labels_BT = torch.tensor([[-100, -100, -100, 13, 14, 15]])
    answers, predicted_at_N = counted(ids_BT, labels_BT)
    assert answers.target_N.tolist() == [13, 14, 15]
    assert predicted_at_N.tolist() == [2, 3, 4]
    assert answers.row_N.tolist() == [0, 0, 0]
    assert answers.rows == 1


def test_rows_of_unequal_length_are_packed_in_order() -> None:
    x = -100
    ids_BT = torch.arange(12).reshape(3, 4)
    labels_BT = torch.tensor([[x, 1, x, x], [x, x, x, x], [x, x, 6, 7]])  # the middle row says nothing
    answers, predicted_at_N = counted(ids_BT, labels_BT)
    assert answers.target_N.tolist() == [1, 6, 7]
    assert answers.row_N.tolist() == [0, 2, 2]
    assert answers.rows == 3
    assert predicted_at_N.tolist() == [0, 9, 10], "of the flattened positions: row * 4 + position - 1"


def test_a_first_token_has_no_prediction_and_a_gap_is_left_out() -> None:
    answers, predicted_at_N = counted(torch.tensor([[5, 6, 7, 8]]), torch.tensor([[5, -100, 7, 8]]))
    assert answers.target_N.tolist() == [7, 8]
    assert predicted_at_N.tolist() == [1, 2]


def test_nothing_counts() -> None:
    answers, predicted_at_N = counted(torch.zeros(2, 1).long(), torch.full((2, 1), -100))
    assert answers.target_N.shape == answers.row_N.shape == predicted_at_N.shape == (0,)
    assert answers.rows == 2


def test_the_logits_of_all_positions_give_the_same_likelihood() -> None:
    """Against the usual way: shift logits and labels, let cross-entropy ignore -100."""
    torch.manual_seed(0)
    ids_BT = torch.randint(20, (4, 9))
    labels_BT = torch.where(torch.rand(4, 9) < 0.5, ids_BT, -100)
    logits_BTV = torch.randn(4, 9, 20)
    usual = torch.nn.functional.cross_entropy(logits_BTV[:, :-1].reshape(-1, 20), labels_BT[:, 1:].reshape(-1))
    answers, predicted_at_N = counted(ids_BT, labels_BT)
    packed_NV = logits_BTV.reshape(-1, 20)[predicted_at_N]
    torch.testing.assert_close(torch.nn.functional.cross_entropy(packed_NV, answers.target_N), usual)
