/* A part of medrun-export, included by tools/export.c: sources that are something else than a whole
 * model. People have a folder or a file and do not know why it does not work: each is named for
 * what it is, with the way out. Tests: tests/20_export.c. */

#include <dirent.h>

/* ---- files by how they begin ---------------------------------------------------------------- */

static const struct { const char *begin, *what, *way; } foreign_files[] = {
    {"MEDRUN0", "a checkpoint of medrun", "medrun runs it as it is"},
    {"PK\3\4", "PyTorch's own form of weights, or a zip archive", "give a folder with safetensors"},
    {"\x80\2", "PyTorch's own form of weights", "give a folder with safetensors"},
    {"\x89HDF", "weights of Keras or TensorFlow", "give a folder with safetensors"},
    {"MZqFpD", "a llamafile", "take the GGUF file that it was made from, or unzip it from there"},
    {"\x1F\x8B", "an archive", "unpack it first"}, {"7z\xBC\xAF", "an archive", "unpack it first"},
    {"\xFD" "7zXZ", "an archive", "unpack it first"}, {"BZh", "an archive", "unpack it first"},
    {"\x28\xB5\x2F\xFD", "an archive", "unpack it first"},
    {"Rar!", "an archive", "unpack it first"},
    {"FROM ", "a Modelfile of Ollama", "give the GGUF file that it names"},
    {"{\"schemaVersion\"", "a manifest of Ollama",
     "give the largest blob that it names, sha256-..."},
    {"tjgg", "GGML, which was before GGUF", "take the model's GGUF file"},
    {"lmgg", "GGML, which was before GGUF", "take the model's GGUF file"},
    {"fmgg", "GGML, which was before GGUF", "take the model's GGUF file"},
};

/* A regular file that is given as the source and is no GGUF. */
static int name_file(const char *path, medrun_error *e) {
    uint8_t head[512] = {0};
    int fd = open_file(path, TO_MAP);
    ssize_t got = fd >= 0 ? read_start(fd, head, sizeof head) : -1;
    if (fd >= 0) close(fd);
    size_t n = got > 0 ? (size_t)got : 0, length = strlen(path);
    if (check_content(path, head, n, e)) return e->code;
    if (!n)
        return refuse(e, "%s: found an empty file, wanted a GGUF file or a Hugging Face folder; "
                      "download it again", path);
    for (size_t i = 0; i < sizeof foreign_files / sizeof *foreign_files; i++)
        if (!memcmp(head, foreign_files[i].begin, strlen(foreign_files[i].begin)))
            return refuse(e, "%s: found %s, wanted a GGUF file or a Hugging Face folder; %s", path,
                          foreign_files[i].what, foreign_files[i].way);
    if (!memcmp(head + 257, "ustar", 5))
        return refuse(e, "%s: found an archive, wanted a GGUF file or a Hugging Face folder; "
                      "unpack it first", path);
    bool safetensors = n > 8 && head[8] == '{' && !head[5] && !head[6] && !head[7];
    if (safetensors || (length > 5 && !strcmp(path + length - 5, ".json")) ||
        (length > 6 && !strcmp(path + length - 6, ".model")))
        return refuse(e, "%s: found one file of a Hugging Face folder, wanted the folder that it "
                      "lies in", path);
    if (length > 5 && !strcmp(path + length - 5, ".onnx"))
        return refuse(e, "%s: found ONNX, wanted a GGUF file or a Hugging Face folder; take the "
                      "model that it was made from", path);
    if (strstr(path, ".gguf-split-") || strstr(path, ".gguf.part"))
        return refuse(e, "%s: found a later piece of a GGUF file that was cut, wanted the whole; "
                      "cat all pieces, in order, > model.gguf", path);
    return refuse(e, "%s: found a file that does not begin with GGUF, wanted a GGUF file or a "
                  "Hugging Face folder", path);
}

/* ---- folders -------------------------------------------------------------------------------- */

/* Copies the first name in FOLDER that begins and ends so; returns how many there are. */
static int find_names(const char *folder, const char *begin, const char *end, char out[256]) {
    DIR *d = opendir(folder);
    size_t n_begin = strlen(begin), n_end = strlen(end);
    int found = 0;
    out[0] = 0;
    for (struct dirent *entry; d && (entry = readdir(d));) {
        const char *name = entry->d_name;
        size_t n = strlen(name);
        if (name[0] == '.' || n >= 256 || n < n_begin + n_end || strncmp(name, begin, n_begin) ||
            strcmp(name + n - n_end, end)) continue;
        if (!found++ || strcmp(name, out) < 0) snprintf(out, 256, "%s", name);
    }
    if (d) closedir(d);
    return found;
}

#define SAVE_IT "save_pretrained(..., safe_serialization=True) of transformers makes them of it"
static const struct { const char *begin, *end, *what, *way; } foreign_weights[] = {
    {"pytorch_model", ".bin", "PyTorch's own form, which can run code", SAVE_IT},
    {"pytorch_model", ".bin.index.json", "PyTorch's own form, which can run code", SAVE_IT},
    {"model", ".pt", "PyTorch's own form, which can run code", SAVE_IT},
    {"consolidated", ".pth", "the form of Meta's own program", "take the model's folder in "
     "transformers' form (its name ends with -hf)"},
    {"consolidated", ".safetensors", "the form of Mistral's own program",
     "take the files that are called model-00001-of-..."},
    {"tf_model", ".h5", "TensorFlow's form", SAVE_IT},
    {"flax_model", ".msgpack", "Flax's form", SAVE_IT},
    {"", ".onnx", "ONNX", "take the model that it was made from"},
    {"weights", ".npz", "an older form of MLX", "take the model that it was made from"},
    {"gptq_model", ".safetensors", "weights quantised by GPTQ",
     "take the model that they were made from"},
    {"", ".gguf", "a GGUF file", "give its own path instead of the folder's"},
    {"model-", ".safetensors", "a part of the weights but no model.safetensors.index.json",
     "fetch that file, too"},
    {"model.safetensors", "", "a link to a file that is not there, or not yet the file",
     "hf download goes on with what was not downloaded to its end"},
    {"adapter_model", "", "an adapter without its adapter_config.json", "fetch that file, too, and "
     "merge it into the model that it is for"},
    {"zero_to_fp32", ".py", "DeepSpeed's form",
     "python zero_to_fp32.py FOLDER OUT --safe_serialization makes them of it"},
    {"pytorch_model_fsdp", "", "FSDP's form", "accelerate merge-weights makes them of it"},
    {"openvino_model", ".xml", "OpenVINO's form", "take the model that it was made from"},
    {"", ".engine", "TensorRT's form", "take the model that it was made from"},
    {"", ".nemo", "NeMo's form", "take the model in transformers' form"},
    {"", ".mlpackage", "Core ML's form", "take the model that it was made from"},
    {"optimizer", ".pt", "the state of a training and no model",
     "take the folder that the model was saved to"},
    {"checkpoint-", "", "the folders of a training", "give the one that is meant"},
    {"model_index", ".json", "a model that draws images", "medrun runs language models only"},
    {"modules", ".json", "a model of embeddings (sentence-transformers)",
     "medrun runs language models only"},
};

/* The name of the model that README.md says this one was made from, or "". */
static void read_base_model(source *s, char *out, size_t cap) {
    buffer b = {0};
    out[0] = 0;
    if (file_exists(s->folder, "README.md") &&
        !read_text(s, "README.md", &b, &(medrun_error){0}) && !b.failed) {
        buffer_add(&b, "", 1);
        if (!b.failed) front_matter((const char *)b.data, "base_model", out, cap);
    }
    buffer_free(&b);
}

/* Refuses a folder that has weights in another form only, if there are any. */
static int name_weights(source *s, medrun_error *e) {
    char name[256], base[128], path[PATH_BYTES];
    for (size_t i = 0; i < sizeof foreign_weights / sizeof *foreign_weights; i++) {
        const char *sub = "";
        bool found = find_names(s->folder, foreign_weights[i].begin, foreign_weights[i].end, name);
        if (!found && !strcmp(foreign_weights[i].end, ".onnx") && file_exists(s->folder, "onnx") &&
            !join_path(path, s->folder, "onnx", e))
            found = find_names(path, "", ".onnx", name), sub = "onnx/";
        if (!found) continue;
        read_base_model(s, base, sizeof base);
        return refuse(e, "%s: found %s%s, %s, wanted safetensors (model.safetensors); %s%s%s",
                      s->folder, sub, name, foreign_weights[i].what, foreign_weights[i].way,
                      *base ? "; README.md names " : "", base);
    }
    return MEDRUN_OK;
}

/* A folder that holds a few numbers to be added to the weights of another model. */
static int name_adapter(source *s, medrun_error *e) {
    json_file f;
    char base[256] = "", type[32] = "";
    if (open_json(s, "adapter_config.json", false, &f, e)) return e->code;
    uint32_t v = given(&f.j, 0, "base_model_name_or_path"), kind = given(&f.j, 0, "peft_type");
    snprintf(base, sizeof base, "%s", v == JSON_NONE ? "a model it does not name" :
             show(&f.j, v).text);
    snprintf(type, sizeof type, "%.30s", kind == JSON_NONE || json_is(&f.j, kind, "LORA") ? "LoRA" :
             show(&f.j, kind).text);
    close_json(&f);
    return refuse(e, "%s: found a %s adapter of %s, which is no model by itself; merge it first: "
                  "PeftModel.from_pretrained(MODEL, \"%s\").merge_and_unload()."
                  "save_pretrained(FOLDER), and put the model's tokenizer beside it", s->folder,
                  type, base, s->folder);
}

static bool has_weights(const char *folder) {
    return file_exists(folder, "model.safetensors") ||
           file_exists(folder, "model.safetensors.index.json");
}

/* Refuses what is no folder of a whole model; finds nothing wrong with one that is. */
static int check_folder(source *s, medrun_error *e) {
    static const char *const quantised[][2] = {{"quantize_config.json", "GPTQ"},
                                               {"quant_config.json", "AWQ"}};
    char name[256];
    file_facts there;
    if (get_facts(s->folder, -1, &there))
        return fail(e, errno_code(MEDRUN_BAD_FILE), "%s: %s; medrun has no network: hf download "
                    "ORG/MODEL --local-dir FOLDER fetches a model", s->folder, strerror(errno));
    if (there.stream)
        return refuse(e, "%s: found a pipe or a device, wanted a GGUF file or a Hugging Face "
                      "folder", s->folder);
    if (file_exists(s->folder, "adapter_config.json") && !has_weights(s->folder))
        return name_adapter(s, e);
    if (file_exists(s->folder, "adapter_config.json"))
        add_note(s, "an adapter lies beside the weights (adapter_config.json): it is not used; if "
                 "it was not merged into them, merge_and_unload() of peft does that");
    for (size_t i = 0; i < 2; i++)
        if (file_exists(s->folder, quantised[i][0]))
            return refuse_quantised(s->folder, "/", quantised[i][0], quantised[i][1], e);
    if (file_exists(s->folder, "config.json")) return MEDRUN_OK;
    if (!has_weights(s->folder) && name_weights(s, e)) return e->code;
    if (find_names(s->folder, "models--", "", name))
        return refuse(e, "%s: found the hub's cache, wanted one model of it, such as %s/%s",
                      s->folder, s->folder, name);
    if (find_names(s->folder, "config.json", "", name))
        return refuse(e, "%s/%s: found a link to a file that is not there, or not yet the file; hf "
                      "download goes on with what was not downloaded to its end", s->folder, name);
    size_t n = strlen(s->folder);
    if ((n > 10 && !strcmp(s->folder + n - 10, "/snapshots")) ||
        (n > 6 && !strcmp(s->folder + n - 6, "/blobs")))
        return refuse(e, "%s: found a part of the hub's cache, wanted one model of it; give the "
                      "folder above", s->folder);
    return refuse(e, "%s: found no config.json, wanted a Hugging Face folder with config.json, "
                  "tokenizer and safetensors, or a GGUF file", s->folder);
}

/* ---- the hub's cache ------------------------------------------------------------------------ */

/* models--ORG--NAME holds folders snapshots/HASH, and in refs/main the HASH of the one that is
 * meant. FOLDER becomes that one. */
static int open_cache(source *s, medrun_error *e) {
    char path[PATH_BYTES], hash[256] = "", at[300];
    buffer b = {0};
    if (file_exists(s->folder, "config.json") || !file_exists(s->folder, "snapshots"))
        return MEDRUN_OK;
    source refs = {.folder = s->folder};
    if (file_exists(s->folder, "refs/main") &&
        !read_text(&refs, "refs/main", &b, &(medrun_error){0}) && b.n < 100) {
        buffer_add(&b, "", 1);
        size_t n = b.failed ? 0 : strspn((const char *)b.data, "0123456789abcdef");
        snprintf(hash, sizeof hash, "%.*s", (int)n, n ? (const char *)b.data : "");
    }
    buffer_free(&b);
    free(refs.files);
    snprintf(at, sizeof at, "snapshots/%s", hash);
    if (!hash[0] || !file_exists(s->folder, at)) {
        if (join_path(path, s->folder, "snapshots", e)) return e->code;
        int n = find_names(path, "", "", hash);
        if (n != 1)
            return refuse(e, "%s: found %d snapshots in this folder of the hub's cache, wanted "
                          "one; give %s", s->folder, n, n ? "one of snapshots/... itself" :
                          "a model that was downloaded to its end");
        snprintf(at, sizeof at, "snapshots/%s", hash);
    }
    if (join_path(path, s->folder, at, e)) return e->code;
    snprintf(s->own_folder, sizeof s->own_folder, "%s", path);
    s->folder = s->own_folder;
    add_note(s, "this is a folder of the hub's cache: its snapshot %s is used", hash);
    return MEDRUN_OK;
}

/* What the hub's cache calls the model whose snapshot PATH is, or NULL. */
static const char *cache_name(char *path) {
    char *models = strstr(path, "models--"), *end = models ? strstr(models, "/snapshots") : NULL;
    if (!end || (end[10] && end[10] != '/')) return NULL;
    *end = 0;
    const char *name = models;
    for (char *p = models; (p = strstr(p, "--")); p += 2) name = p + 2;
    return *name ? name : NULL;
}
