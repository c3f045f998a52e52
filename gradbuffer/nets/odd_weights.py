"""LSTM optimizers that answer the opposite gradients with exactly the opposite updates: their weights.

Optimizees whose coordinates could as well have the other sign, such as random quadratics or a network's weights, give
an optimizer no reason to tell the two apart. With `odd=True`, `CoordinatewiseLSTM`, `LSTMWithGAC` and `NTMBFGS` do not.
"""

import torch

__all__ = ["odd_part"]


@torch.no_grad()
def odd_part(tensors, hidden_size, input_signs, shared=0):
    """The nearest weights with which the optimizer is odd; of a meta-gradient, its part along such weights.

    Under ∇ → -∇ units come in three kinds: *odd* ones change sign (of 20: the first 6), *even* ones stay (the next 2),
    and the others come in pairs that change places. An LSTM keeps to that if its weights stay the same when rows and
    columns are exchanged and signed accordingly: gates must be even, candidates are as their units, the linear layers
    on top are odd. The mean of the weights and of the exchanged ones is the nearest such point. Adam keeps to it too,
    since tied entries have the same history.

    Args:
        tensors: dict like `state_dict()`: an `nn.LSTM` under the name "lstm" and linear layers. Not changed.
        hidden_size: units in each layer.
        input_signs: what becomes of each reading, 1 or -1.
        shared: how many units at the end of each layer are even, whatever the others are.

    Returns:
        dict of new tensors, no graph.
    """
    H, own = hidden_size, hidden_size - shared
    odd, even = 3 * own // 10, own // 10 + (own - 3 * own // 10 - own // 10) % 2
    place, sign = torch.arange(H), torch.ones(H)
    place[odd + even:own] = place[odd + even:own].view(-1, 2).flip(1).flatten()
    sign[:odd] = -1
    units = place, sign
    rows = torch.cat([place + gate * H for gate in range(4)]), torch.cat([sign.abs(), sign.abs(), sign, sign.abs()])
    inputs = torch.arange(len(input_signs)), torch.tensor([float(sign) for sign in input_signs])
    symmetric = {}
    for name, tensor in tensors.items():
        exchanged, outputs = tensor, (torch.arange(tensor.shape[0]), -torch.ones(tensor.shape[0]))
        kinds = [rows if name.startswith("lstm.") else outputs]
        if tensor.dim() == 2:
            kinds.append(inputs if name == "lstm.weight_ih_l0" else units)
        for dim, (places, signs) in enumerate(kinds):
            signs = signs.to(tensor).view([-1] + [1] * (tensor.dim() - 1 - dim))
            exchanged = exchanged.index_select(dim, places.to(tensor.device)) * signs
        symmetric[name] = (tensor + exchanged) / 2
    return symmetric
