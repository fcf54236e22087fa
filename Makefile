# make demo: from a fresh clone to a table in minutes; make demo-detection: to detections.   make test: the suite.
# make setup: what all but detection needs; make setup-detection: all.   make lock: the versions anew.
# make lint: ruff and mypy.   make check-wheel: the library alone, oldest and newest torch.
# make storm: faults on purpose.   make gpu: all that needs a GPU.   make bench: what speed there is.   make cifar10: methods compared.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
DETECTION := $(VENV)/ready-detection
# uv takes the packages that pip would, a few times faster. It does not read pip's settings: where it cannot reach an
# index, pip takes over.
UV := $(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode
PIP := $(BIN)/pip install --quiet --disable-pip-version-check
WHOLE := -c requirements.lock -e ".[train,report,export,slurm,wandb,dev]"
MMDET := -c requirements.lock -e ".[detection]"
# Threads that wait must not burn the core that another one needs: on a busy machine that costs several times over.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo demo-detection test test-all lint bench setup setup-detection lock check-wheel clean

# The lock is a constraint here: what the extras need is installed, in the versions of the lock.
setup: $(READY)

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) "$$(grep ^uv== requirements.lock)"
	$(UV) $(WHOLE) || $(PIP) $(WHOLE)
	touch $@

# MMDetection's stack as well.
# The cv2 of opencv-python, which mmcv asks for by name, needs libGL. opencv-python-headless has the same files without
# it, so it is installed last, over the other.
setup-detection: $(DETECTION)

$(DETECTION): $(READY)
	$(UV) $(MMDET) || $(PIP) $(MMDET)
	headless="$$(grep ^opencv-python-headless requirements.lock)"; \
	$(UV) --no-deps --reinstall "$$headless" || $(PIP) --no-deps --force-reinstall "$$headless"
	touch $@

# Versions stay as they are where pyproject.toml allows; UPGRADE="-P torch" takes the newest torch, UPGRADE=-U of all.
lock: $(READY)
	$(BIN)/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 -o requirements.lock $(UPGRADE)

demo: $(READY)
	$(BIN)/python -m train -m n=static,1/4,1,4
	$(BIN)/python -m scripts.profile_model backbone=resnet_digits data=digits n=1
	$(BIN)/python -m scripts.attentions checkpoint=runs/digits/resnet_digits_kw1x/seed0
	$(BIN)/python -m scripts.report runs/digits

# The paper's tables, row by row: make table-resnet18 DATA=imagenet, with SET="runtime.devices=8 seed=0,1,2" for settings.
# make report shows what runs there are next to what was published.
TABLES := $(addprefix table-,resnet18 resnet50 convnext_tiny mobilenetv2_100 mobilenetv2_050 deit_tiny)
COCO := resnet50 kw1x_resnet50 kw4x_resnet50 mobilenetv2_100 kw1x_mobilenetv2_100 kw4x_mobilenetv2_100 convnext_tiny kw1x_convnext_tiny \
	dyconv4x_resnet50 odconv4x_resnet50 fdconv_resnet50
COMMA := ,
EMPTY :=
NAMED := $(EMPTY) $(EMPTY)
RIVALS := $(patsubst configs/experiment/%.yaml,%,$(wildcard configs/experiment/rivals/*.yaml))
.PHONY: $(TABLES) table-rivals table-coco report

$(TABLES): table-%: $(READY)
	$(if $(DATA),,$(error DATA=PATH is needed: the folder with train/<class>/* and val/<class>/*))
	$(BIN)/python -m train -m 'experiment=glob($**)' data.root=$(DATA) $(SET)

table-rivals: $(READY)
	$(if $(DATA),,$(error DATA=PATH is needed: the folder with train/<class>/* and val/<class>/*))
	$(BIN)/python -m train -m experiment=$(subst $(NAMED),$(COMMA),$(RIVALS)) data.root=$(DATA) $(SET)

table-coco: $(DETECTION)
	$(if $(DATA),,$(error DATA=PATH is needed: the folder with annotations/, train2017/ and val2017/))
	$(BIN)/python -m detection -m config=$(subst $(NAMED),$(COMMA),$(COCO:%=mask_rcnn_%_1x_coco)) data.root=$(DATA) $(SET)

# The comparison of docs/cifar10.md: make -j 2 cifar10 DATA=PATH, one core for each sweep, 22 core-hours in all. Stopped
# at any moment, the same command continues; the page made meanwhile says what is missing. EVIDENCE=FOLDER: runs that
# were made elsewhere, which the page takes too.
SEEDS ?= 0,1,2
CIFAR10_kw := experiment=cifar10/order dynamic=kw n=static,1,4,1/2
CIFAR10_wide := experiment=cifar10/order_wide1x,cifar10/order_wide4x
CIFAR10_rivals := experiment=cifar10/order dynamic=dyconv,odconv n=4
CIFAR10_augmented := experiment=cifar10/order_augmented n=static,1,4
SWEEPS := cifar10-kw cifar10-wide cifar10-rivals cifar10-augmented
.PHONY: cifar10 $(SWEEPS)

$(SWEEPS): cifar10-%: $(READY)
	$(if $(DATA),,$(error DATA=PATH is needed: CIFAR-10 as a folder or a tar of images, or as torchvision keeps it))
	OMP_NUM_THREADS=1 $(BIN)/python -m train -m seed=$(SEEDS) $(CIFAR10_$*) data.root=$(DATA)

cifar10: $(SWEEPS)
	$(BIN)/python -m scripts.cifar10 runs/cifar10 $(EVIDENCE)

report: $(READY)
	$(BIN)/python -m scripts.report runs --all

# A classifier of digits first, whose checkpoint the detector's backbone begins from.
demo-detection: $(DETECTION)
	$(BIN)/python -m scripts.data.digits_coco data/digits
	$(BIN)/python -m train n=1
	$(BIN)/python -m detection config=mask_rcnn_kw1x_digits name=digits init=runs/digits/resnet_digits_kw1x/seed0/checkpoints/last.pt
	$(BIN)/python -m scripts.draw_detections runs/detection/digits/seed0 report/detections.jpg

# Neighbouring tests stay in one process, which makes what they share once; one that is done takes tests from the other.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

test: $(DETECTION)
	$(PYTEST) -m "not slow"

test-all: $(DETECTION)
	$(PYTEST)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The library alone, as a wheel in empty environments: the oldest Python, torch and timm that pyproject.toml allows, and
# the newest. A quarter of an hour each, and 6 GB of disk. Not part of CI.
check-wheel: $(READY)
	$(BIN)/python -m scripts.check_wheel

# What dynamic kernels cost over static ones (table and picture in report/benchmark; about half an hour at most);
# what the trainer costs over a bare loop, and a KW backbone in a detector; with DATA=folder of train/<class>/*, how fast
# images load, compared with timm and torchvision.
bench: $(DETECTION)
	$(BIN)/python -m scripts.bench
	$(BIN)/python -m scripts.bench.trainer
	$(BIN)/python -m scripts.bench.trainer n=1
	$(BIN)/python -m scripts.bench.detection
	$(if $(DATA),$(BIN)/python -m scripts.bench.data $(DATA))

# Faults on purpose: kills, full disks, damaged files, random settings; about half an hour on two cores.
.PHONY: storm
storm: $(DETECTION)
	$(BIN)/python -m scripts.storm

# Everything that needs a GPU, in 8 minutes: the tests marked gpu, prices, benchmarks, blocks, a short training; results are
# in report/gpu, fitted prices in kw/compute/price_tables. DATA=PATH: CIFAR-10 to train on; MINUTES=9: of more time. On a machine
# without .venv its own python3 runs it; what that lacks, make gpu-wheels collects here in .wheels, to be carried along.
# DRY=1 runs all of it on the CPU, tiny, to see that it works.
.PHONY: gpu gpu-wheels
GPU_PYTHON ?= $(if $(DRY)$(wildcard $(BIN)/python),$(BIN)/python,python3)

gpu: $(if $(DRY),$(DETECTION))
	$(GPU_PYTHON) -m scripts.gpu $(if $(DRY),--dry --minutes 30) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(DATA),--data $(DATA))

gpu-wheels: $(READY)
	$(BIN)/python -m scripts.gpu.wheels .wheels

clean:
	rm -rf $(VENV) .wheels runs report data build *.egg-info
