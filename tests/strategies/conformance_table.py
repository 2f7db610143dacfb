"""The smallest honest setting of every registered strategy. A strategy missing here fails the suite."""

from __future__ import annotations

from flowerbed.experiments.conformance import Case

CASES = {
    case.strategy: case
    for case in (
        Case("fedavg"),
        # Server optimizers: the server does not take over the client's model.
        Case("fedavgm", one_client_is_central=False),
        Case("fedadagrad", one_client_is_central=False),
        Case("fedadam", one_client_is_central=False),
        Case("fedyogi", one_client_is_central=False),
        # Corrections of the local gradient. SCAFFOLD and FedNova refuse a momentum that is kept across rounds.
        Case("fedprox", one_client_is_central=False),
        Case("scaffold", settings={"local": {"momentum": 0.0}}),
        Case("feddyn", one_client_is_central=False),
        Case("feddc", one_client_is_central=False),
        Case("fednova", settings={"local": {"momentum": 0.0}}),
        # These train on another loss, or another gradient, than FedAvg's client.
        Case("moon", one_client_is_central=False),
        Case("fedntd", one_client_is_central=False),
        Case("fedsam", one_client_is_central=False),
        # Asynchronous mixing keeps a share of the old model: one client is not the central loop.
        Case("fedasync", settings={"federation": {"cohort": 1}}, one_client_is_central=False),
        Case("fedbuff", settings={"federation": {"cohort": 2}}, one_client_is_central=False),
        # Flower weighs in float32, w * (n / n): exact for one client, and it draws no one.
        Case(
            "flower",
            settings={"strategy": {"name": "flower", "flower": "FedAdam"}},
            one_client_is_central=False,
        ),
        # Personalised: with private parts the server's model is no central one.
        Case("local", one_client_is_central=False),
        Case("finetune", {"tune_epochs": 1}),
        Case("fedper", one_client_is_central=False),
        Case("fedrep", {"head_epochs": 2}, one_client_is_central=False),
        Case("fedbabu", {"tune_epochs": 1}, one_client_is_central=False),
        Case("fedbn", settings={"model": {"name": "resnet8", "norm": "bn"}}, one_client_is_central=False),
        Case("ditto"),
        Case("apfl"),
        Case("fedproto", one_client_is_central=False),
        # These train on another loss than the cross entropy.
        Case("fedrod", one_client_is_central=False),
        Case("pfedme", {"K": 2, "eta": 0.02}, one_client_is_central=False),
        Case("per_fedavg", one_client_is_central=False),
        Case("logit_adjustment", {"prior": "global"}, one_client_is_central=False),
        Case("fedetf", {"alternations": 1, "alternate_epochs": 1}, one_client_is_central=False),
        Case(
            "fedloge",
            {"gamma": 1.0, "beta": 0.3, "ssec_steps": 200, "ssec_lr": 0.01},
            one_client_is_central=False,
        ),
        Case(
            "ggeur",
            {"T": 30, "base": "scaffold"},
            {"model": {"name": "linear"}, "local": {"momentum": 0.0}},
            one_client_is_central=False,
        ),
        # These deliver FedAvg's model with another head.
        Case("tau_norm", one_client_is_central=False),
        Case("creff", {"m": 5, "match_steps": 5, "head_epochs": 5}, one_client_is_central=False),
        # Semi-supervised: with every label seen, labels-only is FedAvg; the others train on another loss.
        Case("labels_only"),
        Case("fedfixmatch", {"tau": 0.3, "mu": 2}, {"data": {"labelled": 0.3}}, one_client_is_central=False),
        Case("feduda", {"tau": 0.3, "mu": 2}, {"data": {"labelled": 0.3}}, one_client_is_central=False),
        Case(
            "fedmatch",
            {"tau": 0.3, "mu": 2, "h_interval": 2},
            {"data": {"labelled": 0.3}, "local": {"lr": 0.02}},
            one_client_is_central=False,
        ),
        Case("fedlabel", {"beta": 0.15}, {"data": {"labelled": 0.3}}, one_client_is_central=False),
        Case("semifl", {"tau": 0.3}, {"data": {"server_per_class": 10}}, one_client_is_central=False),
        # A GAN: no classifier is trained.
        Case(
            "gan",
            settings={
                "model": {
                    "name": "flowerbed.models.generators:gan32",
                    "latent": 4,
                    "embedding": 3,
                    "width": 2,
                },
                "local": {"optimizer": "adam", "momentum": 1e-8, "lr": 0.001},
            },
            one_client_is_central=False,
        ),
        # Robust: with one client there is nothing to compare, so f = 0 where that is allowed at all.
        Case("median", {"f": 0}),
        Case("trimmed_mean", {"f": 0}),
        Case("krum", settings={"federation": {"cohort": 5}}, one_client_is_central=False),
        Case("multi_krum", settings={"federation": {"cohort": 5}}, one_client_is_central=False),
        Case("bulyan", settings={"federation": {"clients": 8, "cohort": 7}}, one_client_is_central=False),
        Case("norm_bounding", {"M": 100.0}),
        Case("centered_clipping", {"f": 0}, one_client_is_central=False),
    )
}
