# medrun: `make run` asks the demo model a question, `make test` runs every test.
# Anything may be overridden: make CC=clang CFLAGS='-O3 -march=native'

CC     ?= cc
CFLAGS ?= -O2
WARN    = -Wall -Wextra -Wshadow -Wconversion
LIBS    = -lm -lpthread $(if $(OPENCL),$(if $(EXE),,-ldl))
PREFIX ?= /usr/local
DEMO    = tools/demo/demo.mdr
BUILD   = build
BIN     = .
OBJ     = $(BUILD)
# OBJ has what programs are linked from. Who gives BIN and a BUILD of its own gives OBJ, too: else all
# programs in BIN are made anew.
LIB     = $(BUILD)/lib
ABI    := $(shell sed -n 's/^.define MEDRUN_VERSION "\([0-9]*\.[0-9]*\)\..*/\1/p' medrun.c)
CL      = $(if $(OPENCL),-DMEDRUN_OPENCL)
SECONDS = 60

# What each test program holds is said in tests/README.md. OWN_KERNELS are those that have a kernel
# for a subject; the others are linked with those of the tools, and compiled with fewer optimizations.
# The longest stand first, so that at the end no processor is without work.
UNITS    = all_kernels all_export all_text all_eval 15_session 15_embedding 15_allocation all_serve \
           16_answers 08_opencl
OWN_KERNELS = all_kernels 05_numbers 06_kernels 07_tensor
JOBS    := $(shell nproc 2>/dev/null || echo 1)
FIXTURES = llama-plain llama-tied llama-sharded llama-grouped mistral-window mistral-spm \
           arcee-yarn arcee-yarn5 apertus-plain apertus-grouped
MODELS   = $(foreach f,$(FIXTURES),$(addprefix $(BUILD)/$(f)-,bf16.mdr int8.mdr int4.mdr)) \
           $(BUILD)/arcee-ratio-bf16.mdr

EXPORT   = $(wildcard tools/export_*.c) tools/options.c tools/files.c tools/read.c tools/write.c tools/store.c
EVAL     = $(wildcard tools/eval_*.c) tools/options.c tools/files.c tools/write.c
EXPLAIN  = $(wildcard tools/explain_*.c) tools/explain_page.h tools/eval.c $(EVAL)

SERVE    = $(wildcard tools/serve_*.c) tools/tool_calls.c tools/options.c tools/write.c
# Each has a manual page in tools/man. medrun-serve needs sockets as POSIX has them.
TOOLS    = medrun medrun-export medrun-eval medrun-lab medrun-explain $(if $(EXE),,medrun-serve)

all: $(foreach p,$(TOOLS),$(BIN)/$(p)$(EXE))
$(foreach p,$(TOOLS),$(BIN)/$(p)$(EXE)): | $(BIN)
$(BIN):
	mkdir -p $@

# Kernels take compilers longest: once for all programs, and once with the tools' own.
# Without make each program is one command: cc -O2 -o medrun medrun.c -lm -lpthread
APART = -DMEDRUN_KERNELS_APART
$(OBJ)/kernels.o: medrun.c
	@mkdir -p $(OBJ)
	$(CC) $(CFLAGS) $(WARN) -DMEDRUN_KERNELS_ONLY -c -o $@ $<
$(OBJ)/kernels_tools.o: medrun.c tools/kernels.h tools/export_int4.h tools/lab_kernels.h
	@mkdir -p $(OBJ)
	$(CC) $(CFLAGS) $(WARN) -DMEDRUN_KERNELS_ONLY -DMEDRUN_MORE_KERNELS='"tools/kernels.h"' -c -o $@ $<

$(BIN)/medrun$(EXE): medrun.c $(OBJ)/kernels.o
	$(CC) $(CFLAGS) $(WARN) $(APART) $(CL) -o $@ $^ $(LIBS)

$(BIN)/medrun-export$(EXE): tools/export.c $(OBJ)/kernels_tools.o $(EXPORT) medrun.c
	$(CC) $(CFLAGS) $(WARN) $(APART) -o $@ $< $(OBJ)/kernels_tools.o $(LIBS)

$(BIN)/medrun-eval$(EXE): tools/eval.c $(OBJ)/kernels.o $(EVAL) medrun.c
	$(CC) $(CFLAGS) $(WARN) $(APART) -o $@ $< $(OBJ)/kernels.o $(LIBS)

$(BIN)/medrun-lab$(EXE): tools/lab.c tools/tool_calls.c tools/write.c tools/store.c tools/explain_lens.c \
                         tools/explain_top.c tools/serve_grammar.c tools/serve_schema.c \
                         tools/lab_constrain.c tools/lab_completion.c $(OBJ)/kernels_tools.o medrun.c
	$(CC) $(CFLAGS) $(WARN) $(APART) $(CL) -o $@ $< $(OBJ)/kernels_tools.o $(LIBS)

# The page is a part of the program, as numbers, for xxd is not everywhere.
$(OBJ)/serve_page.inc: tools/serve_page.html
	@mkdir -p $(OBJ)
	od -An -v -tu1 $< | sed 's/[0-9][0-9]*/&,/g' > $@
$(BIN)/medrun-serve: tools/serve.c $(OBJ)/kernels.o $(SERVE) $(OBJ)/serve_page.inc medrun.c
	$(CC) $(CFLAGS) $(WARN) $(APART) -I$(OBJ) -o $@ $< $(OBJ)/kernels.o $(LIBS)

$(BIN)/medrun-explain$(EXE): tools/explain.c $(OBJ)/kernels.o $(EXPLAIN) medrun.c
	$(CC) $(CFLAGS) $(WARN) $(APART) -o $@ $< $(OBJ)/kernels.o $(LIBS)

# The page as C strings. It is checked in, so that a compiler alone builds the program.
tools/explain_page.h: tools/explain_page.html tools/explain_page.css tools/explain_page.js
	sh tools/explain_page.sh > $@

# One file with no library beside it; make static STATIC_CC=gcc takes the system's own libc.
STATIC_CC  ?= musl-gcc
WINDOWS_CC ?= x86_64-w64-mingw32-gcc
static:
	$(MAKE) BIN=$(BUILD)/static BUILD=$(BUILD)/static CC="$(STATIC_CC)" CFLAGS="$(CFLAGS) -static" all
windows:
	$(MAKE) BIN=$(BUILD)/windows BUILD=$(BUILD)/windows EXE=.exe CC="$(WINDOWS_CC)" CFLAGS="$(CFLAGS) -static" all

explain: $(BIN)/medrun-explain
	@mkdir -p $(BUILD)
	$(BIN)/medrun-explain $(DEMO) -p "What are the symptoms of diabetes?" --why 22 \
	    --what-if 'diabetes=>asthma' --ablate auto -o $(BUILD)/explain.html
	@echo "open $(BUILD)/explain.html in a browser"

# The course in one folder for a room without a network. Programs with no library beside them, if
# there is a compiler for that.
COURSE = $(BUILD)/course
CLASS  = $(if $(shell command -v $(STATIC_CC)),static,all)
$(COURSE)/engine.o: tools/course/engine.c tools/course/course.h medrun.c
	@mkdir -p $(COURSE)
	$(CC) $(CFLAGS) $(WARN) $(APART) -I. -Itools/course -c -o $@ $<
$(COURSE)/pages: tools/course/pages.c $(COURSE)/engine.o $(OBJ)/kernels.o
	$(CC) $(CFLAGS) $(WARN) -I. -Itools/course -o $@ $^ $(LIBS)
class: $(COURSE)/pages
	$(MAKE) $(CLASS)
	sh tools/course/class.sh $(if $(filter static,$(CLASS)),$(BUILD)/static,$(BIN)) $(COURSE)/pages \
	    $(COURSE)/work $(BUILD)/class

run: $(BIN)/medrun
	$(BIN)/medrun run $(DEMO) -p "What are the symptoms of diabetes?"

serve: $(BIN)/medrun-serve
	$(BIN)/medrun-serve $(DEMO)

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
$(BUILD)/test_%: tests/%.c tests/test.h medrun.c tools/export.c $(EXPORT) tools/eval.c $(EVAL) \
                 tools/lab.c tools/lab_constrain.c tools/lab_completion.c tools/tool_calls.c tools/serve.c $(SERVE) \
                 tools/explain.c $(EXPLAIN) $(OBJ)/kernels_tools.o
	@mkdir -p $(BUILD)
	$(CC) $(CFLAGS) $(WARN) -o $@ $< \
	    $(if $(filter $*,$(OWN_KERNELS)),,-O1 $(APART) $(OBJ)/kernels_tools.o) $(LIBS)

$(patsubst tests/%.c,$(BUILD)/test_%,$(wildcard tests/all_*.c)): $(wildcard tests/[0-9]*.c)
$(BUILD)/test_08_opencl: LIBS += -ldl
# It has a heap of its own, about whose blocks clang would know too much.
$(BUILD)/test_15_embedding: LIBS += $(foreach f,malloc calloc realloc free,-fno-builtin-$(f))

PROGRAMS = $(OBJ)/serve_page.inc all $(MODELS) $(REAL) $(BUILD)/tokenizer.bin $(UNITS:%=$(BUILD)/test_%)
programs: $(PROGRAMS)
test:
	@$(MAKE) --no-print-directory $(if $(filter -j% --jobserver%,$(MAKEFLAGS)),,-j$(JOBS)) programs
	@SCRIPTS="$(SCRIPTS)" JOBS="$(JOBS)" CC="$(CC)" OBJ="$(OBJ)" sh tests/run.sh "$(BIN)" "$(BUILD)" $(UNITS)
# Loops that try everything where `make test` tries a part, and programs for other systems.
test-all:
	@MEDRUN_TEST_ALL=1 $(MAKE) --no-print-directory test

# A published model, which is downloaded, against other people's programs.
real: all
	@sh tests/real.sh "$(BIN)" "$(BUILD)"

lint:
	@sh tests/lint.sh
debug:
	@mkdir -p build/debug
	$(MAKE) BUILD=build/debug BIN=build/debug \
	    CFLAGS="-O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all" test
threads:
	@mkdir -p build/threads
	TSAN_OPTIONS=die_after_fork=0 \
	$(MAKE) BUILD=build/threads BIN=build/threads CFLAGS="-O1 -g1 -fsanitize=thread" \
	    UNITS="04_threads 07_tensor 15_session" SCRIPTS=none test
targets:
	sh tools/targets.sh
# Each reader of a stranger's bytes under clang's libFuzzer, for SECONDS.
$(BUILD)/fuzz_readers: tests/fuzz.c tools/export.c $(EXPORT) tools/tool_calls.c \
                       tools/serve_grammar.c tools/serve_schema.c medrun.c
	@mkdir -p $(BUILD)
	clang -O1 -g1 -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -o $@ $< $(LIBS)
$(BUILD)/fuzz_serve: tests/fuzz_serve.c tools/serve.c $(SERVE) medrun.c
	@mkdir -p $(BUILD)
	clang -O1 -g1 -DMEDRUN_SCALAR -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all -o $@ $< $(LIBS)
fuzz: $(BUILD)/fuzz_readers $(BUILD)/fuzz_serve $(MODELS) $(BUILD)/tokenizer.bin
	@sh tests/fuzz.sh $(BUILD)/fuzz_readers $(SECONDS) $(READERS)
bench: $(BIN)/medrun-lab
	$(BIN)/medrun-lab bench $(DEMO)
size:
	@CC="$(CC)" CFLAGS="$(CFLAGS)" sh tools/size.sh $(BUILD)
# The lists of options in the manual pages, from --help.
man: all
	sh tools/man/options.sh $(BIN) tools/man/*.1
SHARE = $(DESTDIR)$(PREFIX)/share
BASH  = $(SHARE)/bash-completion/completions
ZSH   = $(SHARE)/zsh/site-functions
FISH  = $(SHARE)/fish/vendor_completions.d
install: install-programs install-lib
install-programs: all
	install -d $(DESTDIR)$(PREFIX)/bin $(SHARE)/man/man1 $(SHARE)/medrun $(BASH) $(ZSH) $(FISH)
	install $(addprefix $(BIN)/,$(TOOLS)) $(DESTDIR)$(PREFIX)/bin
	install -m 644 $(patsubst %,tools/man/%.1,$(TOOLS)) $(SHARE)/man/man1
	install -m 644 $(DEMO) $(SHARE)/medrun
	$(BIN)/medrun-lab completion bash > $(BASH)/medrun
	$(BIN)/medrun-lab completion zsh > $(ZSH)/_medrun
	$(BIN)/medrun-lab completion fish > $(FISH)/medrun.fish
	cd $(BASH) && for p in $(filter-out medrun,$(TOOLS)); do ln -sf medrun $$p; done
	cd $(FISH) && for p in $(filter-out medrun,$(TOOLS)); do ln -sf medrun.fish $$p.fish; done
uninstall:
	cd $(DESTDIR)$(PREFIX)/bin && rm -f $(TOOLS)
	cd $(SHARE)/man/man1 && rm -f $(addsuffix .1,$(TOOLS))
	cd $(BASH) && rm -f $(TOOLS)
	cd $(FISH) && rm -f $(addsuffix .fish,$(TOOLS))
	rm -f $(ZSH)/_medrun $(SHARE)/medrun/demo.mdr
	-rmdir $(SHARE)/medrun
	rm -f $(DESTDIR)$(LIBDIR)/libmedrun.* $(DESTDIR)$(LIBDIR)/pkgconfig/medrun.pc
	rm -f $(DESTDIR)$(PREFIX)/include/medrun.h
lib: $(LIB)/libmedrun.a $(LIB)/libmedrun.so $(LIB)/medrun.h
$(LIB)/medrun.o: medrun.c
	@mkdir -p $(LIB)
	$(CC) $(CFLAGS) $(WARN) $(CL) -fPIC -DMEDRUN_NO_MAIN -c -o $@ medrun.c
$(LIB)/libmedrun.a: $(LIB)/medrun.o
	rm -f $@ && $(AR) rcs $@ $<
$(LIB)/libmedrun.so: $(LIB)/medrun.o
	echo 'MEDRUN_$(ABI) { global: medrun_*; local: *; };' > $(LIB)/libmedrun.map
	$(CC) $(CFLAGS) -shared -Wl,-soname,libmedrun.so.$(ABI) \
	    -Wl,--version-script,$(LIB)/libmedrun.map -o $@.$(ABI) $< $(LIBS)
	ln -sf libmedrun.so.$(ABI) $@
$(LIB)/medrun.h: medrun.c
	@mkdir -p $(LIB)
	sed -n '/^#ifndef MEDRUN_H$$/,/^#endif .. MEDRUN_H/p' medrun.c > $@
LIBDIR ?= $(PREFIX)/lib
install-lib: lib
	install -d $(DESTDIR)$(LIBDIR)/pkgconfig $(DESTDIR)$(PREFIX)/include
	install -m 644 $(LIB)/libmedrun.a $(LIB)/libmedrun.so.$(ABI) $(DESTDIR)$(LIBDIR)
	ln -sf libmedrun.so.$(ABI) $(DESTDIR)$(LIBDIR)/libmedrun.so
	install -m 644 $(LIB)/medrun.h $(DESTDIR)$(PREFIX)/include
	printf '%s\n' 'Name: medrun' 'Description: runs open medical language models on a CPU' \
	    'Version: $(ABI)' 'Cflags: -I$(PREFIX)/include' 'Libs: -L$(LIBDIR) -lmedrun' \
	    'Libs.private: $(LIBS)' > $(DESTDIR)$(LIBDIR)/pkgconfig/medrun.pc
dist:
	@sh tools/dist.sh $(BUILD)/dist
.PHONY: lib install-lib dist
clean:
	rm -rf $(BUILD) $(TOOLS)
help:
	@echo "make            builds medrun, medrun-export, -eval, -lab, -explain and -serve"
	@echo "make OPENCL=1   the same with OpenCL devices (make clean first)"
	@echo "make run        asks the demo model a question"
	@echo "make serve      serves the demo model on http://127.0.0.1:8080"
	@echo "make explain    writes a page that shows how it came to its answer"
	@echo "make class      the course for a room without a network, in one folder: build/class"
	@echo "make lib        libmedrun.a, libmedrun.so, medrun.h in build/lib; make install-lib"
	@echo "make dist       archives of the last commit, programs and source, in build/dist"
	@echo "make test       runs the tests; with MEDRUN_TEST_DATA also those on real vocabularies"
	@echo "make test-all   also the longest loops in full and programs for other systems"
	@echo "make real       a published model (93 MB, downloaded) against Hugging Face and llama.cpp"
	@echo "make debug      the tests under address and undefined-behaviour sanitizers"
	@echo "make threads    those of the thread pool and sessions under the thread sanitizer"
	@echo "make fuzz       strangers' files, made up by clang's libFuzzer: 60 s a reader; SECONDS=600"
	@echo "make lint       the budget of each section, rules of the source, warnings, clang-tidy"
	@echo "make targets    the same bits on other processors and systems, emulated where they must be"
	@echo "make size       bytes of code and data, by each compiler for another processor, too"
	@echo "make static     the programs in build/static, by musl-gcc, with no library beside"
	@echo "make windows    the programs in build/windows, by mingw-w64"
	@echo "make install    programs, manual pages, completions, demo model, library under PREFIX=/usr/local;"
	@echo "                make uninstall; tools/packaging has packages for Debian, Homebrew and pip"
	@echo "make bench, make man, make clean"

.PHONY: all static windows run explain class programs test test-all real lint debug threads fuzz bench targets size man \
        install install-programs uninstall clean help
