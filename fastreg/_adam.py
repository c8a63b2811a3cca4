"""Adam over one parameter, as torch.optim.Adam(fused=True) takes it.

That class, when first made, imports torch's compiler: 0.9 s of a registration that takes 0.2 s. The step is torch's own."""

import torch
from torch import Tensor


class Adam:
    """Kingma and Ba 2015, algorithm 1; betas 0.9 and 0.999. `learning_rate` may be changed between steps."""

    def __init__(self, parameter: Tensor, learning_rate: float, eps: float = 1e-8) -> None:
        self.parameter, self.learning_rate, self.eps = parameter, learning_rate, eps
        self.moments = torch.zeros_like(parameter), torch.zeros_like(parameter)
        self.count = torch.zeros((), dtype=torch.float32, device=parameter.device)

    def zero_grad(self) -> None:
        self.parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        gradient = self.parameter.grad
        assert gradient is not None
        self.count += 1
        torch._fused_adam_(
            [self.parameter],
            [gradient],
            [self.moments[0]],
            [self.moments[1]],
            [],
            [self.count],
            lr=self.learning_rate,
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )
