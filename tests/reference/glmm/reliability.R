# Reliability of the herds' effects, 1 - conditional variance / variance: Rscript reliability.R > reliability.json
library(lme4)
exact <- glmerControl(optimizer = "bobyqa", tolPwrss = 1e-12, optCtrl = list(rhoend = 1e-9))
model <- glmer(cbind(incidence, size - incidence) ~ period + (1 | herd),
  transform(read.csv("cbpp.csv"), period = factor(period)), binomial, control = exact)
modes <- ranef(model, condVar = TRUE)$herd
share <- 1 - attr(modes, "postVar")[1, 1, ] / as.numeric(VarCorr(model)$herd)
cat(sprintf('{"levels": [%s], "reliability": [%s]}\n',
  paste0('"', rownames(modes), '"', collapse = ", "), paste(format(share, digits = 10), collapse = ", ")))
