{
  # native/ holds the only C++: strata.node is the product's, strata_loadgen.node the benchmark client's.
  "variables": { "strata_sanitize%": "<!(node -p \"process.env.STRATA_SANITIZE === '1' ? 1 : 0\")" },
  "target_defaults": {
    "include_dirs": ["<!(node -p \"require('node-addon-api').include_dir\")"],
    "defines": ["NAPI_VERSION=9", "NODE_ADDON_API_DISABLE_DEPRECATED", "NODE_ADDON_API_DISABLE_CPP_EXCEPTIONS"],
    "cflags": ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-cast-function-type", "-fvisibility=hidden"],
    "cflags_cc!": ["-fno-exceptions", "-fno-rtti"],
    "cflags_cc": ["-O2", "-fno-exceptions"],
    "conditions": [
      ["target_arch=='x64'", { "cflags_cc": ["-msse4.2"] }],
      [
        "strata_sanitize==1",
        {
          "cflags_cc": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"],
          "ldflags": ["-fsanitize=address,undefined"]
        }
      ]
    ]
  },
  "targets": [
    {
      "target_name": "strata",
      "sources": [
        "native/addon.cc",
        "native/arena.cc",
        "native/bytes.cc",
        "native/cipher.cc",
        "native/codec-pool.cc",
        "native/codec.cc",
        "native/file.cc",
        "native/ring.cc",
        "native/socket.cc",
        "native/thread.cc"
      ],
      "dependencies": ["<!(node -p \"require('path').relative('.', require.resolve('zstd-napi/deps/zstd.gyp'))\"):libzstd"],
      # Its threads and its signal handler outlive the threads of Node that load it.
      "ldflags": ["-Wl,-z,nodelete"]
    },
    { "target_name": "strata_loadgen", "sources": ["native/loadgen.cc"] }
  ]
}
