"""RegVar (McInerney & Kallus, AISTATS 2025): predictive variance as the response of predictions to regularisation."""
