"""The engine under the laws: bounded fits from many starts, what the points identify, and how sure the result is.

- `points`: columns of observations, and what their design holds (levels, units);
- `forms`: a formula with the bounds of its parameters, and the objective that its fit minimises;
- `problem`: a form, its points and the parameters that are fixed: residuals, Jacobian, search coordinates;
- `search`: the minimum of the objective, and which parameters the points identify;
- `inference`: the bootstrap over runs, intervals, profiles;
- `metrics`: goodness of fit;
- `held_out`: what is held out, how far off the prediction is, and the ranking of rival forms.

What is minimised is the sum over points of Huber's loss of the residuals r, or of r^2 / 2 where there is no delta:

    h(r) = r^2 / 2 for |r| <= delta, delta (|r| - delta / 2) beyond;    r = y' - y, or ln y' - ln y

Sources: Chinchilla Scaling: A Replication Attempt (arXiv 2404.10102) for the objective (a sum, never a mean), the many
starts, the bootstrap and the test of convergence by the gradient. P2 Law: Scaling Law for Post-Training After Model
Pruning (arXiv 2411.10272) for the metrics and the held-out protocols.
"""
