// Metal.h - as much of Apple's Metal as ggml-metal-device.m needs to be parsed, for clang -fsyntax-only on any machine.
//
// SPDX-License-Identifier: MIT

#pragma once

#import <Foundation/Foundation.h>

typedef NSUInteger MTLLanguageVersion, MTLDataType, MTLResourceOptions, MTLGPUFamily;
typedef struct { NSUInteger width, height, depth; } MTLSize;

MTLSize MTLSizeMake(NSUInteger width, NSUInteger height, NSUInteger depth);

enum { MTLDataTypeInt = 29, MTLDataTypeShort = 37, MTLDataTypeBool = 53 };
enum { MTLResourceStorageModeShared = 0, MTLResourceStorageModePrivate = 32 };
enum { MTLGPUFamilyApple1 = 1001, MTLGPUFamilyApple6 = 1006, MTLGPUFamilyApple7 = 1007, MTLGPUFamilyCommon1 = 3001 };
enum { MTLDispatchTypeSerial = 0, MTLDispatchTypeConcurrent = 1, MTLBarrierScopeBuffers = 1, MTLDeviceLocationExternal = 2 };

@protocol MTLResidencySet <NSObject>
@end

@protocol MTLBuffer <NSObject>
- (void *) contents;
@property (readonly) NSUInteger length;
@end

@protocol MTLFunction <NSObject>
@end

@protocol MTLComputePipelineState <NSObject>
@property (readonly) NSUInteger maxTotalThreadsPerThreadgroup, threadExecutionWidth, staticThreadgroupMemoryLength;
@end

@protocol MTLLibrary <NSObject>
- (NSArray<NSString *> *) functionNames;
@end

@protocol MTLSharedEvent <NSObject>
@property uint64_t signaledValue;
@end

@protocol MTLBlitCommandEncoder <NSObject>
@end

@protocol MTLComputeCommandEncoder <NSObject>
@end

@protocol MTLCommandBuffer <NSObject>
@end

@protocol MTLCommandQueue <NSObject>
@end

@protocol MTLDevice <NSObject>
- (BOOL) supportsFamily: (MTLGPUFamily) family;
@property (readonly) NSString * name;
@property (readonly) BOOL hasUnifiedMemory;
@property (readonly) NSUInteger maxBufferLength, maxThreadgroupMemoryLength, currentAllocatedSize, location;
@property (readonly) uint64_t recommendedMaxWorkingSetSize, registryID;
@property (readonly) MTLSize maxThreadsPerThreadgroup;
@end

id<MTLDevice> MTLCreateSystemDefaultDevice(void);
NSArray<id<MTLDevice>> * MTLCopyAllDevices(void);

@interface MTLFunctionConstantValues : NSObject
- (void) setConstantValue: (const void *) value type: (MTLDataType) type atIndex: (NSUInteger) index;
@end

@interface MTLCompileOptions : NSObject
@property MTLLanguageVersion languageVersion;
@property (copy) NSDictionary<NSString *, NSObject *> * preprocessorMacros;
@end

@interface MTLResidencySetDescriptor : NSObject
@property (copy) NSString * label;
@property NSUInteger initialCapacity;
@end
