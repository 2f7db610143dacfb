"""Published methods, one module or package each, run by ``flowerbed reproduce <slug>``.

A paper is its code, ``experiments/papers/<slug with underscores>``, and every number of its protocol,
``experiments/conf/paper/<slug>.yaml``. Nothing else is edited; the slug must be in the catalogue. This is how to write
one; ``ps_kd`` and ``dr_tune`` are examples.

**The module** begins with the reference, the equations in the paper's letters, the controls, and what differs from the
released code and why. What the paper invented is in it and nothing else. A small paper is one file, which ends with
``PAPER = Paper(...)``. Others are a package: ``__init__`` is the method, ``probes`` the models and data of the
reproduction and what it measures, ``claims`` says ``PAPER``, ``central`` has the plain twins, ``figure`` the picture.
A change of the last three repeats no run.

*The method* is a strategy like any other, a server half and a client half; most papers override one or two methods of
``ClientHalf`` and derive the server from ``FedAvg``, which with one client is the identity::

    class MineHalf(ClientHalf):
        def loss(self, model, batch, extras, task): ...     # pure: what is differentiated

    class Mine(FedAvg):
        Params, Half = MineParams, MineHalf                 # a frozen dataclass with the paper's letters

Where the method needs more than a loss:

=====================================  ==========================================================================
targets or streams of one's own        ``ClientHalf.batches``: step to batch; add keys to the batch, or make it
memory of each sample across rounds    ``flowerbed.clients.memory.SampleMemory`` in ``begin``, kept in ``end``
what the forward pass produced         a tensor with dimensions among the loss's metrics; ``Step.products`` has it
gradients without backpropagation      ``ClientHalf.estimate``; the ``Evaluation`` it is given has ``at(parameters)``
an edit of the gradients               ``ClientHalf.correct``
proximal steps, masks, averages        ``ClientHalf.after_step``, which sees the learning rate used
learned tensors beside the model       ``ClientHalf.further``
weights that decay, others that do not ``ClientHalf.decayed``
samples to choose by, not to train on  ``Dataset.validation``; a client's share is ``LocalRound.validation_data``
a second level of training on them     ``flowerbed.clients.bilevel``
fresh samples in every step            ``flowerbed.clients.streams``; independent draws: ``local.replacement=true``
features of earlier batches            ``flowerbed.clients.queues``
another task's features to start from  ``initial: {weights: FILE, part: backbone}``
several trainings, solvers, fits       ``ClientHalf.run``, calling ``train(...)`` as often as need be
statistics before training             a phase of type ``query``, answered by ``ClientHalf.query``
something between stages               ``FederatedStrategy.phases`` and ``start_phase``
other aggregation                      ``FederatedStrategy.aggregate`` (or ``pooled`` and ``combine``)
stages that change the model           arms that start from each other: ``initial: {weights: "{model:ARM}"}``
a model or data of one's own           a builder ``(input_shape, num_classes, **options)``, a factory of a ``Dataset``,
                                       named ":Name" in the protocol; those that others could use go to ``models/``
                                       and ``datasets/``
data without labels to predict         ``Dataset(task="measured")``: only the measures judge
metrics of the delivered model         functions of a ``Measured``, in ``evaluation.measures``
metrics of a finished run, of all arms ``Paper.measure``, ``Paper.analyse``
=====================================  ==========================================================================

State that must outlive a round lives in ``local.state`` and ``self.state`` (groups of named tensors) and nowhere else;
every random number comes from ``flowerbed.seeds``. Then a run resumes to the same bits, and N clients are one override.

*The claims* are the paper's sentences as inequalities with their margins, each with a control that would pass if the
gain came from something cheap. They are never weakened, removed or re-seeded until they pass::

    accuracy = metric("accuracy")
    Claim("better", "Mine is better than plain training.", accuracy["mine"] >= accuracy["plain"] + 0.01)

*Plain twins* (``Paper.central``) say what an arm is without any federation; conformance compares them bit for bit.

**The protocol** is described in ``flowerbed.experiments.reproduction.paper``. Three scales: ``smoke`` (seconds, no
claim is evaluated), ``quick`` (two cores, at most ten minutes for everything), ``full`` (one GPU).

**Tests** in ``tests/papers/test_<module>.py``: the identities and pitfalls of the method, on hand-worked cases. What
every paper must hold (each arm runs, resumes, repeats, equals its twin) is tested for all of them by
``tests/experiments/test_reproduction_conformance.py``, without a line for each.
"""
