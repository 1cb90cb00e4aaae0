# medrun: `make run` asks the demo model a question, `make test` runs every test.
# Anything may be overridden: make CC=clang CFLAGS='-O3 -march=native'

CC     ?= cc
CFLAGS ?= -O2
WARN    = -Wall -Wextra -Wshadow -Wconversion
LIBS    = -lm -lpthread
PREFIX ?= /usr/local
DEMO    = tools/demo/demo.mdr
BUILD   = build
BIN     = .

UNITS    = 03_basics 04_threads 05_numbers 06_kernels 07_tensor 09_file 10_tokenizer 11_chat \
           12_model 13_transformer 14_sampler 15_allocation 15_session 16_answers 20_export 21_gguf
FIXTURES = llama-plain llama-tied llama-sharded llama-grouped mistral-window mistral-spm \
           arcee-yarn arcee-yarn5 apertus-plain apertus-grouped
MODELS   = $(foreach f,$(FIXTURES),$(addprefix $(BUILD)/$(f)-,bf16.mdr int8.mdr int4.mdr)) \
           $(BUILD)/arcee-ratio-bf16.mdr

EXPORT   = $(wildcard tools/export_*.c)

all: $(BIN)/medrun $(BIN)/medrun-export

$(BIN)/medrun: medrun.c
	@mkdir -p $(BIN)
	$(CC) $(CFLAGS) $(WARN) -o $@ medrun.c $(LIBS)

$(BIN)/medrun-export: tools/export.c $(EXPORT) medrun.c
	$(CC) $(CFLAGS) $(WARN) -o $@ tools/export.c $(LIBS)

run: $(BIN)/medrun
	$(BIN)/medrun run $(DEMO) -p "What are the symptoms of diabetes?"

# The fixtures are Hugging Face folders; what the tests open is exported from them.
$(BUILD)/%-bf16.mdr: $(BIN)/medrun-export tests/fixtures/%/config.json
	@mkdir -p $(BUILD)
	$(BIN)/medrun-export tests/fixtures/$* $@ --type bf16
$(BUILD)/%-int8.mdr: $(BIN)/medrun-export tests/fixtures/%/config.json
	@mkdir -p $(BUILD)
	$(BIN)/medrun-export tests/fixtures/$* $@ --type int8
$(BUILD)/%-int4.mdr: $(BIN)/medrun-export tests/fixtures/%/config.json
	@mkdir -p $(BUILD)
	$(BIN)/medrun-export tests/fixtures/$* $@ --type int4
$(BUILD)/tokenizer.bin: $(BIN)/medrun-export tests/fixtures/tokenizer/tokenizer.json
	@mkdir -p $(BUILD)
	$(BIN)/medrun-export --tokenizer-only tests/fixtures/tokenizer $@
$(BUILD)/arcee-ratio-bf16.mdr: $(BIN)/medrun-export tests/fixtures/arcee-yarn/config.json
	@mkdir -p $(BUILD)
	$(BIN)/medrun-export tests/fixtures/arcee-yarn $@ --type bf16 --yarn-factor 8
# Real vocabularies are read where the environment says, and skipped where it says nothing.
ifdef MEDRUN_TEST_DATA
REAL_llama3    = llama3-8b
REAL_llama2    = llama2.tokenizer.model
REAL_mistral   = mistral-7b-v0.1.tokenizer.json
REAL_apertus   = apertus.derived.tokenizer.json
REAL_ministral = tekken-ministral-8b-2410.tokenizer.json
REAL = $(foreach r,llama3 llama2 mistral apertus ministral,$(BUILD)/$(r).tokenizer.bin)
$(REAL): $(BUILD)/%.tokenizer.bin: $(BIN)/medrun-export
	@mkdir -p $(BUILD)
	$(BIN)/medrun-export --tokenizer-only $(MEDRUN_TEST_DATA)/tokenizers/$(REAL_$*) $@
endif
$(BUILD)/test_%: tests/%.c tests/test.h medrun.c tools/export.c $(EXPORT)
	@mkdir -p $(BUILD)
	$(CC) $(CFLAGS) $(WARN) -o $@ $< $(LIBS)

test: all $(MODELS) $(REAL) $(BUILD)/tokenizer.bin $(UNITS:%=$(BUILD)/test_%)
	@SCRIPTS="$(SCRIPTS)" CC="$(CC)" sh tests/run.sh "$(BIN)" "$(BUILD)" $(UNITS)

lint:
	@sh tests/lint.sh
debug:
	@mkdir -p build/debug
	$(MAKE) BUILD=build/debug BIN=build/debug \
	    CFLAGS="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all" test
threads:
	@mkdir -p build/threads
	$(MAKE) BUILD=build/threads BIN=build/threads CFLAGS="-O1 -g1 -fsanitize=thread" \
	    UNITS="04_threads 07_tensor 15_session" SCRIPTS=none test
targets:
	sh tools/targets.sh
size:
	@CC="$(CC)" CFLAGS="$(CFLAGS)" sh tools/size.sh $(BUILD)
install: all
	install -d $(DESTDIR)$(PREFIX)/bin
	install $(BIN)/medrun $(BIN)/medrun-export $(DESTDIR)$(PREFIX)/bin
clean:
	rm -rf $(BUILD) medrun medrun-export
help:
	@echo "make            builds medrun and medrun-export"
	@echo "make run        asks the demo model a question"
	@echo "make test       runs every test; with MEDRUN_TEST_DATA also those on real vocabularies"
	@echo "make debug      the tests under address and undefined-behaviour sanitizers"
	@echo "make threads    those of the thread pool and sessions under the thread sanitizer"
	@echo "make targets    the same bits on other processors and systems, as far as they can be emulated here"
	@echo "make lint       line lengths, function lengths, warnings of gcc and clang, clang-tidy"
	@echo "make size       bytes of code and data, for each processor there is a compiler for"
	@echo "make install, make clean"

.PHONY: all run test lint debug threads targets size install clean help
