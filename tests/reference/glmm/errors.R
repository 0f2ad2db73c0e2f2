# Standard errors of the fits by glmer of reference.json, by both of lme4's rules:
# from the Hessian of the deviance in (theta, beta), and with theta held at its estimate,
# which are those that reference.json has. Writes errors.json. Run in this folder.
suppressMessages({library(lme4); library(jsonlite)})
cases <- fromJSON("reference.json", simplifyVector = FALSE)
text <- c("period", "herd", "ID", "trt", "livch", "YEAR", "BROOD", "INDEX", "LOCATION")
control <- glmerControl(
  optimizer = "bobyqa", optCtrl = list(rhobeg = 0.02, rhoend = 1e-8, maxfun = 1e5), tolPwrss = 1e-12
)
found <- list()
for (case in cases) {
  if (case$engine != "glmer") next
  table <- read.csv(paste0(case$data, ".csv"))
  for (name in intersect(text, names(table))) table[[name]] <- factor(table[[name]])
  fit <- glmer(
    as.formula(case$formula), table, nAGQ = case$nAGQ, control = control,
    family = get(case$family)(link = case$link)
  )
  errors <- function(hessian) as.list(sqrt(diag(as.matrix(vcov(fit, use.hessian = hessian)))))
  found[[length(found) + 1]] <- list(
    id = case$id, nAGQ = case$nAGQ, hessian = errors(TRUE), held = errors(FALSE)
  )
}
write_json(found, "errors.json", digits = NA, auto_unbox = TRUE, pretty = TRUE)
