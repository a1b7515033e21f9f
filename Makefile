# make demo: the whole method on the AT&T faces.   make test: all the tests.   make results-orl, -lfw, ...: more rows.
# PY=python3 uses an environment that you have and installs nothing. Otherwise one is made, which VENV=DIR moves; it is
# keyed by requirements.txt, so a changed requirement makes a new one. ORL=DIR, LFW=DIR, OMNIGLOT=DIR say where data are.

SETS := results-orl results-lfw results-omniglot results-omniglot-5

.PHONY: demo test clean kills $(SETS)
.NOTPARALLEL:
.DEFAULT_GOAL := demo

RUNS ?= runs/demo
ORL ?=
ifdef PY
ENV :=
else
DIGEST := $(shell python3 -c "import hashlib, sys; \
	print('%d.%d-' % sys.version_info[:2] + hashlib.sha256(open('requirements.txt', 'rb').read()).hexdigest()[:12])")
VENV ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/scoremix/venv-$(DIGEST)
PY := $(VENV)/bin/python
ENV := $(VENV)/.complete

$(ENV):
	python3 -m venv $(if $(filter file,$(origin VENV)),--clear) $(VENV)
	$(PY) -m pip install --quiet -r requirements.txt
	touch $@
endif

demo: $(RUNS)/report/results.json
	@echo; cat $(RUNS)/report/table.md
	@echo "AT&T is this project's development set. One fold of ten people and one seed show that the chain runs, no more."
	@echo; echo "pictures: $(RUNS)/mixed/preview.png (real, reproduced, mixed), $(RUNS)/generator/samples-*.png,"
	@echo "          $(RUNS)/report/roc.png, $(RUNS)/report/similarity.png"

test: | $(ENV)
	$(PY) -m pytest -q tests

$(SETS): results-%: | $(ENV)  # the rows that are not there yet: many hours on two cores
	PY=$(PY) results/$*/run.sh

kills: | $(ENV)  # kill -9 at 60 random moments of the stages, and the same bytes in the end; five minutes
	$(PY) tests/kill.py --kills 60 --out results/kills.md

clean:
	rm -rf $(RUNS)

# A stage that was killed goes on: its files are newer than its inputs. A stage whose input changed starts afresh.
afresh = @rm -rf $(@D).old; for i in $^; do if [ -e $(@D)/config.json ] && [ $(@D)/config.json -ot $$i ]; then \
	mv $(@D) $(@D).old && rm -rf $(@D).old; fi; done

$(RUNS)/data/split.json: | $(ENV)
	$(PY) prepare_data.py orl $(ORL) --fold 0 --size 32 --out $(@D)

$(RUNS)/real/model.pt: $(RUNS)/data/split.json
	$(afresh)
	$(PY) train_recognizer.py --data $(RUNS)/data/train --size 32 --out $(@D)

$(RUNS)/generator/model.pt: $(RUNS)/data/split.json
	$(afresh)
	$(PY) train_diffusion.py --data $(RUNS)/data/train --size 32 --out $(@D)

$(RUNS)/pairs.csv: $(RUNS)/real/model.pt $(RUNS)/data/split.json
	@rm -f $@
	$(PY) mine_pairs.py --recognizer $(RUNS)/real --data $(RUNS)/data/train --out $@

$(RUNS)/mixed/manifest.csv: $(RUNS)/generator/model.pt $(RUNS)/pairs.csv
	$(afresh)
	$(PY) sample_scoremix.py --generator $(RUNS)/generator --pairs $(RUNS)/pairs.csv --out $(@D)

$(RUNS)/scoremix/model.pt: $(RUNS)/data/split.json $(RUNS)/mixed/manifest.csv
	$(afresh)
	$(PY) train_recognizer.py --data $(RUNS)/data/train $(RUNS)/mixed --size 32 --out $(@D)

$(RUNS)/report/results.json: $(RUNS)/real/model.pt $(RUNS)/scoremix/model.pt $(RUNS)/data/split.json
	$(afresh)
	$(PY) evaluate.py --model $(RUNS)/real $(RUNS)/scoremix --data $(RUNS)/data/test --out $(@D)
