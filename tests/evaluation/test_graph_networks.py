"""What networks read of a graph: their sparse sums against dense ones, and their layers against the formulas."""

import torch
from torch.nn import functional as F

from mllm_msr.evaluation.graph_networks import AttentionLayer, Edges, GraphNetwork, MeanLayer

HIDDEN, N_USERS, N_ITEMS = 6, 5, 9


def graph() -> tuple[torch.Tensor, Edges, Edges]:
    """(U, I) of ones, its edges to users and to items; user 2 and item 4 have none."""
    torch.manual_seed(0)
    matrix = (torch.rand(N_USERS, N_ITEMS) < 0.5).float()
    matrix[2], matrix[:, 4] = 0, 0
    to_users = Edges(matrix.nonzero()[:, 1], F.pad(matrix.sum(dim=1).long().cumsum(0), (1, 0)))
    return matrix, to_users, to_users.turned(N_ITEMS)


def test_sums_over_edges_are_products_with_the_matrix():
    matrix, to_users, to_items = graph()
    values, logits = torch.randn(N_ITEMS, HIDDEN), torch.randn(len(to_users.sources))
    torch.testing.assert_close(to_users.mean(values), matrix @ values / matrix.sum(dim=1, keepdim=True).clamp(min=1))
    dense = torch.full((N_USERS, N_ITEMS), -torch.inf)
    dense[to_users.targets, to_users.sources] = logits
    weights = dense.softmax(dim=1).nan_to_num()
    torch.testing.assert_close(to_users.softmax(logits), weights[to_users.targets, to_users.sources])
    torch.testing.assert_close(to_users.sum(values, to_users.softmax(logits)), weights @ values)
    users = torch.randn(N_USERS, HIDDEN)
    torch.testing.assert_close(to_items.mean(users), matrix.T @ users / matrix.sum(dim=0)[:, None].clamp(min=1))


def test_layers_are_those_of_the_formulas():
    matrix, to_users, _ = graph()
    own, items, identity = (torch.randn(size, HIDDEN) for size in (N_USERS, N_ITEMS, N_USERS))
    for kind in (MeanLayer, AttentionLayer):
        layer = kind(HIDDEN)
        values = layer.read(items)
        weights = matrix / matrix.sum(dim=1, keepdim=True).clamp(min=1)
        if kind is AttentionLayer:
            alike = layer.read(own) @ F.leaky_relu(values).T
            gated = alike * torch.sigmoid(alike / matrix.sum(dim=1, keepdim=True).sqrt())
            weights = gated.masked_fill(matrix == 0, -torch.inf).softmax(dim=1).nan_to_num()
        combined = layer.combine(F.leaky_relu(weights @ values))
        expected = F.leaky_relu(combined + F.leaky_relu(layer.keep(own)) + identity)
        torch.testing.assert_close(layer(own, items, to_users, identity), expected)


def test_a_known_user_with_his_training_history_is_the_node_of_training():
    _, to_users, to_items = graph()
    for all_layers in (False, True):
        layers = [AttentionLayer(HIDDEN), AttentionLayer(HIDDEN)]
        trained = to_items.degrees > 0
        network = GraphNetwork(N_USERS, torch.randn(N_ITEMS, 4), trained, layers, HIDDEN, all_layers)
        assert not network.item_identity[4].any()
        users, items = network(to_users, to_items)
        torch.testing.assert_close(network.task_users(torch.arange(N_USERS), to_users, items), users)
        unknown = network.task_users(torch.full((N_USERS,), -1), to_users, items)
        assert torch.isfinite(unknown).all() and not torch.allclose(unknown, users)
