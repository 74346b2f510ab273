"""The slow, dense, obviously right version of everything, in float64 with torch.func. Shares no code with the core.

One example at a time, one layer at a time, every matrix written out. A layer's gradient is the matrix [out, in(+1)],
flattened row by row to a vector; the Fisher of a layer is the full matrix over that vector.
"""

import torch
from torch.func import functional_call, grad

MASK_64 = (1 << 64) - 1


def layer_gradient(model, name, loss, transposed):
    """d loss(model) / d [weight, bias] of one layer as [out, in(+1)]; `loss` takes a function like the model."""
    module = model.get_submodule(name)
    parameters = {f"{name}.{key}": value.detach() for key, value in module.named_parameters()}

    def loss_of(parameters):
        return loss(lambda *arguments, **options: functional_call(model, parameters, arguments, options))

    gradients = grad(loss_of)(parameters)
    weight = gradients[f"{name}.weight"]
    weight = weight.T if transposed else weight
    if f"{name}.bias" not in gradients:
        return weight
    return torch.cat([weight, gradients[f"{name}.bias"][:, None]], dim=1)


def parameter_gradient(model, name, loss):
    """d loss(model) / d one parameter, in its own shape, wherever it is used: modules may share it."""
    parameter = model.get_parameter(name)
    names = [each for each, other in model.named_parameters(remove_duplicate=False) if other is parameter]

    def loss_of(value):
        def run(*arguments, **options):
            return functional_call(model, dict.fromkeys(names, value), arguments, options)

        return loss(run)

    return grad(loss_of)(parameter.detach())


def covariances(model, name, losses, masks):
    """(A, G): means over real positions of a a^T (with its one for a bias) and g g^T.

    losses: one function for each example, of a function like the model; masks: [positions] bool for each example.
    """
    module = model.get_submodule(name)
    has_bias = getattr(module, "bias", None) is not None
    activation_sum, gradient_sum, count = 0, 0, 0
    for loss, mask in zip(losses, masks):
        calls = []

        def keep(module, arguments, output, calls=calls):
            output = output + torch.zeros_like(output).requires_grad_()
            output.retain_grad()
            calls.append((arguments[0].detach(), output))
            return output

        handle = module.register_forward_hook(keep)
        loss(model).backward()
        handle.remove()
        for inputs, output in calls:
            inputs, gradients = inputs.reshape(-1, inputs.shape[-1]), output.grad.reshape(-1, output.shape[-1])
            for position in range(len(inputs)):
                if not mask[position]:
                    continue
                a = torch.cat([inputs[position], inputs.new_ones(1)]) if has_bias else inputs[position]
                activation_sum = activation_sum + torch.outer(a, a)
                gradient_sum = gradient_sum + torch.outer(gradients[position], gradients[position])
                count += 1
    return activation_sum / count, gradient_sum / count


def fisher(gradients):
    """E[vec(g) vec(g)^T] of [n, out, in(+1)]."""
    vectors = gradients.flatten(1)
    return vectors.T @ vectors / len(vectors)


def approximate_fisher(strategy, gradients, activation_covariance, gradient_covariance):
    """The strategy's approximation of a layer's Fisher, as a full matrix."""
    size = gradients[0].numel()
    if strategy == "identity":
        return torch.eye(size, dtype=gradients.dtype)
    if strategy == "diagonal":
        return torch.diag(torch.diag(fisher(gradients)))
    if strategy == "kfac":
        return torch.kron(gradient_covariance, activation_covariance)
    basis = torch.kron(torch.linalg.eigh(gradient_covariance)[1], torch.linalg.eigh(activation_covariance)[1])
    eigenvalues = torch.diag(basis.T @ fisher(gradients) @ basis)
    return basis @ torch.diag(eigenvalues) @ basis.T


def precondition(strategy, approximation, damping, gradient):
    """(F + damping I)^-1 g by a dense solve; the identity takes no damping."""
    vector = gradient.flatten()
    if strategy == "identity":
        return gradient
    eye = torch.eye(len(vector), dtype=vector.dtype)
    return torch.linalg.solve(approximation + damping * eye, vector).view_as(gradient)


def scores(strategy, approximation, damping, query_gradients, train_gradients):
    """score[q, t] = g_q^T (F + damping)^-1 g_t for one layer."""
    rows = [
        torch.stack(
            [(precondition(strategy, approximation, damping, query) * train).sum() for train in train_gradients]
        )
        for query in query_gradients
    ]
    return torch.stack(rows)


def splitmix(x):
    """The splitmix64 finaliser, on Python integers."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK_64
    return x ^ (x >> 31)


def uniform(seed, example, position):
    """The uniform number of (seed, example, position)."""
    golden = 0x9E3779B97F4A7C15
    state = splitmix((example * golden + seed * 0xD1342543DE82EF95) & MASK_64)
    return (splitmix((state + (position + 1) * golden) & MASK_64) >> 40) / 2**24


def sampled_label(logits, u):
    """The first category whose cumulative probability exceeds u."""
    cumulative = 0.0
    for category, probability in enumerate(logits.double().softmax(-1).tolist()):
        cumulative += probability
        if cumulative > u:
            return category
    return len(logits) - 1


def position_gradients(model, site, loss):
    """What comes through each position of a module: its parameters' gradients, were there others at each position.

    Returns:
        for each call of the module, {name of the parameter: [positions, *its shape]}.
    """
    module, calls = model.get_submodule(site), []
    is_inside = False

    def hook(module, arguments, keywords, output):
        nonlocal is_inside
        if is_inside:
            return output
        is_inside = True
        (seen,) = (*arguments, *keywords.values())
        has_positions = seen.dim() > 2 or not seen.is_floating_point()
        seen = seen if has_positions else seen.unsqueeze(1)  # one a row
        own = {
            key: torch.stack([value.detach()] * seen.shape[1]).requires_grad_()
            for key, value in module.named_parameters()
        }
        parts = [
            functional_call(module, {key: copies[p] for key, copies in own.items()}, (seen[:, p : p + 1],))
            for p in range(seen.shape[1])
        ]
        is_inside = False
        calls.append(own)
        return torch.cat(parts, dim=1) if has_positions else parts[0].squeeze(1)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    loss(model).backward()
    handle.remove()
    model.zero_grad()
    return [{key: torch.zeros_like(x) if x.grad is None else x.grad for key, x in own.items()} for own in calls]
